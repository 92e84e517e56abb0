#!/usr/bin/env bash
# torch 2.13.0: inductor's cache of compiled graphs on disk is not keyed by the operators that an operator's gradient
# calls. A program whose backward operator has gained an argument finds the backward graph of the version before,
# which calls the operator without it. Seen: the second program fails with "missing value for argument 'note'",
# although its own source passes one; with a fresh cache folder it runs. Fails if that changes. Needs a C++ compiler,
# no GPU.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy setuptools
cat > "$folder/program.py" <<'PY'
import sys

import torch

grown = sys.argv[1] == "2"


@torch.library.custom_op("demo::square", mutates_args=(), schema="(Tensor x) -> Tensor")
def square(x):
    return x * x


@square.register_fake
def _(x):
    return torch.empty_like(x)


schema = "(Tensor grad, Tensor x, str? note) -> Tensor" if grown else "(Tensor grad, Tensor x) -> Tensor"


@torch.library.custom_op("demo::square_backward", mutates_args=(), schema=schema)
def square_backward(grad, x, *note):
    return 2 * grad * x


@square_backward.register_fake
def _(grad, x, *note):
    return torch.empty_like(x)


def backward(ctx, grad):
    (x,) = ctx.saved_tensors
    return torch.ops.demo.square_backward(grad, x, *([None] if grown else []))


square.register_autograd(backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs))


def call(x):
    return torch.ops.demo.square(x).sum()


x = torch.arange(8, dtype=torch.float32, requires_grad=True)
torch.compile(call)(x).backward()
assert torch.equal(x.grad, 2 * x.detach())
print("version", sys.argv[1], "runs")
PY
run() { TORCHINDUCTOR_CACHE_DIR="$folder/$1" "$folder/venv/bin/python" "$folder/program.py" "$2"; }
run cache 1
if run cache 2 2> "$folder/error"; then
  echo "the behaviour has changed: the second version runs" >&2
  exit 1
fi
grep -o "demo::square_backward() is missing value for argument 'note'" "$folder/error" | head -1
run fresh 2
