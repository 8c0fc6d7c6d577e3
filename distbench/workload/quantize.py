"""fp8 (e4m3) as devices round to it, and with a float32 scale for each 128 columns, as production dispatches it."""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.architectures import Fp8Format
from distbench.workload.plan import BLOCK
from distbench.workload.steps import rows_at_a_time

_CHUNK_ELEMENTS = 4 << 20


def fp8_dtype(fp8_format: Fp8Format) -> torch.dtype:
    """Return torch's name of a format."""
    dtype: torch.dtype = getattr(torch, f"float8_{fp8_format}")
    return dtype


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as fp8 `dtype`: what is larger than its largest number becomes that, as on devices."""
    most = torch.finfo(dtype).max
    return values.clamp(-most, most).to(dtype)


def quantize_fp8_blocks(hidden: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return hidden [n, H] as fp8 `dtype` [n, H] and scales float32 [n, H/128]; H is a multiple of 128.

    scale = amax / the largest number of `dtype` (1 where a block is all zeros); values are divided by it, clamped, and
    rounded to nearest even.
    """
    rows, columns = hidden.shape
    quantized = torch.empty(rows, columns, dtype=dtype, device=hidden.device)
    scales = torch.empty(rows, columns // BLOCK, device=hidden.device)
    step = rows_at_a_time(_CHUNK_ELEMENTS, columns, hidden.device)
    for start in range(0, rows, step):
        part = hidden[start : start + step].float()
        blocks = part.view(part.shape[0], columns // BLOCK, BLOCK)
        amax = blocks.abs().amax(2)
        # By a tensor: CUDA turns division by a number into a product with its rounded inverse.
        scale = torch.where(amax == 0, 1.0, amax / torch.full_like(amax, torch.finfo(dtype).max))
        quantized[start : start + step] = saturated(blocks / scale.unsqueeze(2), dtype).flatten(1)
        scales[start : start + step] = scale
    return quantized, scales


def dequantize(hidden: Tensor, scales: Tensor | None) -> Tensor:
    """Return rows [n, H] as float32, block-scaled ones multiplied out; scales float32 [n, H/128] or None."""
    if scales is None:
        return hidden.float()
    rows, columns = hidden.shape
    return (hidden.float().view(rows, columns // BLOCK, BLOCK) * scales.unsqueeze(2)).view(rows, columns)
