"""A rank's weights as e4m3 with a scale per 128 x 128, kept until the weights change."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distbench.workload.quantize import quantize_weight_blocks


class Quantized(NamedTuple):
    """w1 e4m3 [El, 2I, H] and w2 [El, H, I], and their scales, float32 powers of two.

    scales1 [2 El, ceil(I/128), ceil(H/128)] has those of gate and up apart; scales2 [El, ceil(H/128), ceil(I/128)].
    """

    w1: Tensor
    w2: Tensor
    scales1: Tensor
    scales2: Tensor

    @property
    def joined_scales1(self) -> Tensor:
        """scales1 as [El, 2I/128, H/128], for an I of whole blocks: gate before up."""
        return self.scales1.view(self.w1.shape[0], -1, self.scales1.shape[2])


class _Known(NamedTuple):
    """Quantised weights; holding `given` keeps other tensors from reusing its addresses."""

    key: tuple[int, ...]
    given: tuple[Tensor, Tensor]
    quantized: Quantized


class QuantizedWeights:
    """Quantises bf16 weights once, until they change; weights made in inference mode count as unchanged."""

    def __init__(self) -> None:
        self._known: _Known | None = None

    def of(self, w1: Tensor, w2: Tensor) -> Quantized:
        """Return bf16 w1 [El, 2I, H] and w2 [El, H, I] quantised."""
        key = (w1.data_ptr(), _changes(w1), w2.data_ptr(), _changes(w2))
        if self._known is None or self._known.key != key:
            local, double, hidden = w1.shape
            first, scales1 = quantize_weight_blocks(w1.view(2 * local, double // 2, hidden), torch.float8_e4m3fn)
            second, scales2 = quantize_weight_blocks(w2, torch.float8_e4m3fn)
            self._known = _Known(key, (w1, w2), Quantized(first.view(w1.shape), second, scales1, scales2))
        return self._known.quantized


def _changes(weights: Tensor) -> int:
    """Return the number of writes to the weights, which torch does not count in inference mode."""
    return 0 if weights.is_inference() else weights._version  # noqa: SLF001 - torch counts changes there
