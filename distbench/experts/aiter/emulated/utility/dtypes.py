"""Dtypes by aiter's names; fp8 is the device's own format."""

from __future__ import annotations

import torch

from distbench.experts.aiter.emulated.quirks import assumed
from distbench.utils.amd_arch import fp8_format
from distbench.workload.quantize import fp8_dtype

bf16 = torch.bfloat16
fp16 = torch.float16
fp32 = torch.float32
i32 = torch.int32


def get_dtype_fp8() -> torch.dtype:
    """Return the 8-bit format of the device."""
    return fp8_dtype(fp8_format(assumed().gfx))


def __getattr__(name: str) -> torch.dtype:
    if name == "fp8":
        return get_dtype_fp8()
    raise AttributeError(name)
