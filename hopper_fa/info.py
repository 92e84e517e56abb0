"""What this build holds and what machine it runs on."""

import importlib.metadata
import platform
from typing import Any

import torch

from hopper_fa import kernels

try:
    __version__ = importlib.metadata.version("hopper_fa")
except importlib.metadata.PackageNotFoundError:  # a copy of the folder, which works too
    __version__ = "unknown (no installed metadata)"


def build_info() -> dict[str, Any]:
    """What the compiled module holds; needs no GPU.

    Returns:
        version: of hopper_fa. cuda_version, cutlass_version: what its kernels were compiled with.
        instances: one dictionary a compiled attention kernel: family ("forward", "backward"), dtype ("bf16",
            "fp16", "e4m3", "int8") and its tile-table row: head_dim (the widest it takes), variant,
            block_m x block_n (query rows x keys), kv_stages (backward: q_stages, do_stages), threads,
            producer_registers and consumer_registers (a thread), shared_memory (bytes a CTA), ...
    """
    instances = []
    for family, rows in (("forward", kernels.FORWARD_TILES), ("backward", kernels.BACKWARD_TILES)):
        for row in rows:
            tile = {name: value for name, value in row.items() if name != "dtypes"}
            instances += [{"family": family, "dtype": dtype, **tile} for dtype in row["dtypes"]]
    return {
        "version": __version__,
        "cuda_version": kernels.VERSIONS["cuda"],
        "cutlass_version": kernels.VERSIONS["cutlass"],
        "instances": instances,
    }


def machine_info() -> dict[str, Any]:
    """Python, torch, driver and GPUs, by NVML.

    Returns:
        python, torch, torch_cuda (CUDA version torch was built for, None without), driver (None without),
        gpus (a list of name, compute_capability, memory_gib, runs_kernels), and nvml: "ok", or why there is
        no driver to report.
    """
    info: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "driver": None,
        "gpus": [],
    }
    try:
        import pynvml
    except ImportError:
        return info | {"nvml": "the nvidia-ml-py package is not installed"}
    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError as error:
        return info | {"nvml": str(error)}
    try:
        info["driver"] = pynvml.nvmlSystemGetDriverVersion()
        for index in range(pynvml.nvmlDeviceGetCount()):
            handle = pynvml.nvmlDeviceGetHandleByIndex(index)
            major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
            info["gpus"].append(
                {
                    "name": pynvml.nvmlDeviceGetName(handle),
                    "compute_capability": f"{major}.{minor}",
                    "memory_gib": round(pynvml.nvmlDeviceGetMemoryInfo(handle).total / 2**30, 1),
                    "runs_kernels": (major, minor) == (9, 0),
                }
            )
    finally:
        pynvml.nvmlShutdown()
    return info | {"nvml": "ok"}
