"""Block-scaled fp8 (e4m3) for dispatch, as production quantises: a float32 scale for each 128 columns."""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.workload.plan import BLOCK
from distbench.workload.steps import rows_at_a_time

FP8_MAX = 448.0

_CHUNK_ELEMENTS = 4 << 20


def quantize_fp8_blocks(hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Return hidden [n, H] as float8_e4m3fn [n, H] and scales float32 [n, H/128]; H is a multiple of 128.

    scale = amax / 448 (1 where a block is all zeros); values are divided by it, clamped, and rounded to nearest even.
    """
    rows, columns = hidden.shape
    quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn, device=hidden.device)
    scales = torch.empty(rows, columns // BLOCK, device=hidden.device)
    step = rows_at_a_time(_CHUNK_ELEMENTS, columns, hidden.device)
    for start in range(0, rows, step):
        part = hidden[start : start + step].float()
        blocks = part.view(part.shape[0], columns // BLOCK, BLOCK)
        amax = blocks.abs().amax(2)
        # By a tensor: CUDA turns division by a number into a product with its rounded inverse.
        scale = torch.where(amax == 0, 1.0, amax / torch.full_like(amax, FP8_MAX))
        scaled = (blocks / scale.unsqueeze(2)).clamp_(-FP8_MAX, FP8_MAX)
        quantized[start : start + step] = scaled.flatten(1).to(torch.float8_e4m3fn)
        scales[start : start + step] = scale
    return quantized, scales


def dequantize(hidden: Tensor, scales: Tensor | None) -> Tensor:
    """Return rows [n, H] as float32, block-scaled ones multiplied out; scales float32 [n, H/128] or None."""
    if scales is None:
        return hidden.float()
    rows, columns = hidden.shape
    return (hidden.float().view(rows, columns // BLOCK, BLOCK) * scales.unsqueeze(2)).view(rows, columns)
