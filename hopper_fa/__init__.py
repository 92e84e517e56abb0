"""Attention for NVIDIA Hopper GPUs, written to be studied and changed."""

from hopper_fa.attention import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_quantized_func,
    merge_attention,
    quantize_qkv,
)
from hopper_fa.info import __version__, build_info
from hopper_fa.metrics import error_metrics
from hopper_fa.quantization import QuantizedQKV
from hopper_fa.recipe import Fp8Recipe
from hopper_fa.reference import attention_reference

__all__ = [
    "Fp8Recipe",
    "QuantizedQKV",
    "__version__",
    "attention_reference",
    "build_info",
    "error_metrics",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_quantized_func",
    "merge_attention",
    "quantize_qkv",
]
