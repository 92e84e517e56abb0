"""FLOPs of the operators for torch.utils.flop_counter: the counts that torch has for the same attention.

That is every score, also those that a causal mask hides, and no difference between 16 and 8 bits.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

import torch

_COUNTER = "torch.utils.flop_counter"


def register() -> None:
    """Give torch's counter the formulas, now or when it is imported.

    NOTE: to import it here would import Triton too, which takes longer than all of hopper_fa; and a counter
    takes its formulas when it is made, so that at the first call it would be too late.
    """
    if _COUNTER in sys.modules:
        _register(sys.modules[_COUNTER])
    else:
        sys.meta_path.insert(0, _AtImport())


class _AtImport(MetaPathFinder):
    """Registers the formulas once the counter has been imported, by whoever imports it."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != _COUNTER:
            return None
        spec = PathFinder.find_spec(fullname, path, target)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_and_register(module: ModuleType) -> None:
            # NOTE: not before, as a spec may be looked for by somebody who then imports nothing.
            if self in sys.meta_path:
                sys.meta_path.remove(self)
            execute(module)
            _register(module)

        spec.loader.exec_module = execute_and_register
        return spec


def _register(counter: ModuleType) -> None:
    ops = torch.ops.hopper_fa

    @counter.register_flop_formula([ops.forward, ops.forward_e4m3])
    def forward_flop(qkv: list[Sequence[int]], *_: Any, out_shape: Any = None, **__: Any) -> int:
        return counter.sdpa_flop_count(*_heads_first(qkv))

    @counter.register_flop_formula(ops.forward_quantized)
    def forward_quantized_flop(q: Sequence[int], *others: Any, out_shape: Any = None, **__: Any) -> int:
        batch, seqlen_q, heads_q, _ = q
        head_dim, _, seqlen_k = others[9:12]
        shapes = [(batch, seqlen, heads_q, head_dim) for seqlen in (seqlen_q, seqlen_k, seqlen_k)]
        return counter.sdpa_flop_count(*_heads_first(shapes))

    @counter.register_flop_formula([ops.backward, ops.backward_by_recipe])
    def backward_flop(
        dout: Sequence[int], dlse: Any, qkv: list[Sequence[int]], *_: Any, out_shape: Any = None, **__: Any
    ) -> int:
        q, k, v = _heads_first(qkv)
        return counter.sdpa_backward_flop_count(q, q, k, v)

    @counter.register_flop_formula(ops.backward_quantized)
    def backward_quantized_flop(dout: Sequence[int], *others: Any, out_shape: Any = None, **__: Any) -> int:
        batch, seqlen_q, heads_q, head_dim = dout
        seqlen_k = others[4][2]
        shapes = [(batch, seqlen, heads_q, head_dim) for seqlen in (seqlen_q, seqlen_k, seqlen_k)]
        q, k, v = _heads_first(shapes)
        return counter.sdpa_backward_flop_count(q, q, k, v)


def _heads_first(shapes: list[Sequence[int]]) -> tuple[tuple[int, ...], ...]:
    """(batch, heads_q, seqlen, head_dim) of q, k and v, packed or not; every query head counts with keys."""
    batch, *_, head_dim = shapes[0]
    heads_q = shapes[0][-2]
    seqlen_q, seqlen_k = shapes[0][1], shapes[-1][1]
    q, k = ((batch, heads_q, seqlen, head_dim) for seqlen in (seqlen_q, seqlen_k))
    return q, k, k
