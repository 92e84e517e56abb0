"""What the compiled module links, and what importing the package needs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import torch

from hopper_fa import build_info, kernels


def run_python(code: str, **environment: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(kernels.__file__).parents[1],  # where the bare sources do not hide the installed package
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_module_needs_neither_torch_nor_driver() -> None:
    """Loaded by its path in a fresh interpreter; /proc lists every library that came with it."""
    libraries = run_python(
        f"""
import importlib.util
spec = importlib.util.spec_from_file_location("hopper_fa._C", {kernels._C.__file__!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
assert module.forward_tiles()
print(open("/proc/self/maps").read())
"""
    )
    assert "_C" in libraries
    assert re.findall(r"lib(?:torch|c10|cuda|cudart|nvidia)[\w.-]*", libraries) == []


def test_import_without_gpu() -> None:
    output = run_python(
        "import hopper_fa, torch; print(torch.cuda.is_initialized(), hopper_fa.build_info()['version'])",
        CUDA_VISIBLE_DEVICES="",
    )
    assert output.split()[0] == "False"


def test_public_names() -> None:
    import hopper_fa

    assert set(hopper_fa.__all__) == {
        "__version__",
        "attention_reference",
        "build_info",
        "error_metrics",
        "flash_attn_func",
        "flash_attn_kvpacked_func",
        "flash_attn_qkvpacked_func",
        "flash_attn_quantized_func",
        "Fp8Recipe",
        "merge_attention",
        "quantize_qkv",
        "QuantizedQKV",
    }
    assert all(hasattr(hopper_fa, name) for name in hopper_fa.__all__)


def test_build_info_lists_what_is_built() -> None:
    info = build_info()
    assert info["cuda_version"] and info["cutlass_version"].startswith("4.")
    held = {(row["family"], row["dtype"], row["head_dim"], row["variant"]) for row in info["instances"]}
    assert len(held) == len(info["instances"])
    for dtype, name in kernels.DTYPE_NAMES.items():
        for head_dim in range(8, 257, 8):
            tile = kernels.forward_tile(head_dim)
            runs = (dtype, head_dim, "default") in kernels._INSTANCES
            assert runs == (("forward", name, tile["head_dim"], "default") in held)
            tile = kernels.backward_tile(head_dim)
            assert (name in tile["dtypes"]) == (("backward", name, tile["head_dim"], "default") in held)


def test_each_stream_and_each_captured_launch_has_its_own_workspace(monkeypatch) -> None:
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None, **options: zeros(*size, **options))
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor)
    monkeypatch.setattr(kernels._Workspaces, "_SLOTS", 4)
    workspaces = kernels._Workspaces(0)
    assert workspaces.slot(11, False) is workspaces.slot(11, False)
    slots = [workspaces.slot(stream, capturing) for stream in (11, 12) for capturing in (False, True, True)]
    slots += [workspaces.slot(2, False) for _ in range(2)]  # the per-thread stream, maybe of two threads
    assert len({slot.data_ptr() for slot in slots}) == 8  # beyond the fourth they are allocated one by one
    assert all(slot.dtype == torch.int32 and not slot.any() for slot in slots)
    assert all(slot.numel() >= kernels._C.FORWARD_WORKSPACE_INTS for slot in slots)
