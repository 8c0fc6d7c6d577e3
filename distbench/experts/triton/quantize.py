"""Expert weights as float8 e4m3 with a scale for each 128 x 128, by powers of two."""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.workload.plan import BLOCK

# To the next power of two at and above amax / 448: 448 is 1.75 * 2**8, and a mantissa above 1.75 carries.
_CARRY, _EXPONENT, _EXPONENT_OF_448 = 0x1FFFFF, 0x7F800000, 8 << 23
_LEAST = 1e-30


def quantize_weights(weights: Tensor) -> tuple[Tensor, Tensor]:
    """Return weights [n, N, K] as float8_e4m3fn and scales float32 [n, ceil(N/128), ceil(K/128)].

    A scale is the smallest power of two that keeps its block within 448, so only rounding to e4m3 loses anything: the
    whole numbers of an exact workload lose nothing.
    """
    count, height, width = weights.shape
    tall, wide = -(-height // BLOCK), -(-width // BLOCK)
    quantized = torch.empty_like(weights, dtype=torch.float8_e4m3fn)
    scales = torch.empty(count, tall, wide, device=weights.device)
    for one, source, target in zip(scales, weights, quantized, strict=True):
        padded = torch.zeros(tall * BLOCK, wide * BLOCK, device=weights.device)
        padded[:height, :width] = source
        blocks = padded.view(tall, BLOCK, wide, BLOCK)
        amax = blocks.abs().amax((1, 3))
        bits = ((amax.view(torch.int32) + _CARRY) & _EXPONENT) - _EXPONENT_OF_448
        one.copy_(torch.where(amax > _LEAST, bits.view(torch.float32), 1.0))
        blocks /= one.view(tall, 1, wide, 1)
        target.copy_(padded[:height, :width].to(torch.float8_e4m3fn))
    return quantized, scales
