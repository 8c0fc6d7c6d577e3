"""fp8 (e4m3) rounding as devices do it, and block quantisation with a float32 scale per 128 columns, as in production.

Weights and the stored intermediate have scales that are powers of two, per 128 x 128 block and per 128 columns: the
rounding to e4m3 is the only loss.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.utils.amd_arch import Fp8Format
from distbench.workload.chunking import rows_at_a_time
from distbench.workload.exact_plan import BLOCK

_CHUNK_ELEMENTS = 4 << 20
_EXPONENT, _MANTISSA, _MANTISSA_BITS = 0x7F80_0000, 0x007F_FFFF, 23
_LEAST = 1e-30


def fp8_dtype(fp8_format: Fp8Format) -> torch.dtype:
    """Return torch's dtype of an fp8 format."""
    dtype: torch.dtype = getattr(torch, f"float8_{fp8_format}")
    return dtype


def saturated(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values as fp8 `dtype`, saturated at its largest number as on devices."""
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
        # Divide by a tensor: CUDA turns division by a Python number into a product with its rounded inverse.
        scale = torch.where(amax == 0, 1.0, amax / torch.full_like(amax, torch.finfo(dtype).max))
        quantized[start : start + step] = saturated(blocks / scale.unsqueeze(2), dtype).flatten(1)
        scales[start : start + step] = scale
    return quantized, scales


def dequantize(hidden: Tensor, scales: Tensor | None) -> Tensor:
    """Return rows [n, H] as float32, multiplied by their block scales, float32 [n, H/128] or None."""
    if scales is None:
        return hidden.float()
    rows, columns = hidden.shape
    return (hidden.float().view(rows, columns // BLOCK, BLOCK) * scales.unsqueeze(2)).view(rows, columns)


def quantize_weight_blocks(weights: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return weights [n, N, K] as fp8 `dtype`, and scales float32 [n, ceil(N/128), ceil(K/128)], powers of two."""
    count, height, width = weights.shape
    tall, wide = -(-height // BLOCK), -(-width // BLOCK)
    quantized = torch.empty_like(weights, dtype=dtype)
    scales = torch.empty(count, tall, wide, device=weights.device)
    for one, source, target in zip(scales, weights, quantized, strict=True):
        padded = source.float() if (height, width) == (tall * BLOCK, wide * BLOCK) else _padded(source, tall, wide)
        blocks = padded.view(tall, BLOCK, wide, BLOCK)
        one.copy_(power_of_two_scales(blocks.abs().amax((1, 3)), dtype))
        target.copy_((blocks / one.view(tall, 1, wide, 1)).view(padded.shape)[:height, :width].to(dtype))
    return quantized, scales


def through_weight_blocks(weights: Tensor, dtype: torch.dtype) -> Tensor:
    """Return weights [n, N, K] after a round trip through `quantize_weight_blocks`: bf16, which holds them exactly."""
    quantized, scales = quantize_weight_blocks(weights, dtype)
    left = torch.empty_like(weights, dtype=torch.bfloat16)
    for one, source, target in zip(scales, quantized, left, strict=True):
        by_row = one.repeat_interleave(BLOCK, 0)[: source.shape[0]]
        target.copy_(source.float() * by_row.repeat_interleave(BLOCK, 1)[:, : source.shape[1]])
    return left


def through_blocks(rows: Tensor, dtype: torch.dtype, *, power_of_two: bool) -> Tensor:
    """Return rows [..., K] after a round trip through fp8 `dtype` with a scale per 128 columns: float32.

    A scale is the least power of two that keeps its block within the format, or the block's maximum over the format's
    largest number.
    """
    columns = rows.shape[-1]
    blocks = torch.nn.functional.pad(rows.float(), (0, -columns % BLOCK)).unflatten(-1, (-1, BLOCK))
    amax = blocks.abs().amax(-1, keepdim=True)
    if power_of_two:
        scales = power_of_two_scales(amax, dtype)
    else:
        scales = torch.where(amax == 0, 1.0, amax / torch.full_like(amax, torch.finfo(dtype).max))
    return (saturated(blocks / scales, dtype).float() * scales).flatten(-2)[..., :columns]


def power_of_two_scales(amax: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the least power of two by which amax float32 fits fp8 `dtype` when divided; 1 where amax is 0 or tiny."""
    most = int(torch.tensor(torch.finfo(dtype).max).view(torch.int32))
    carry = _MANTISSA - (most & _MANTISSA)  # a mantissa above that of the largest number needs the next power
    bits = ((amax.view(torch.int32) + carry) & _EXPONENT) - ((most >> _MANTISSA_BITS) - 127 << _MANTISSA_BITS)
    return torch.where(amax > _LEAST, bits.view(torch.float32), 1.0)


def _padded(source: Tensor, tall: int, wide: int) -> Tensor:
    padded = torch.zeros(tall * BLOCK, wide * BLOCK, device=source.device)
    padded[: source.shape[0], : source.shape[1]] = source
    return padded
