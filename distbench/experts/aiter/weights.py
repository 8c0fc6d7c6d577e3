"""Weights in the layout of aiter's kernels: shuffled and marked, in float8 with block scales where rows are float8."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.workload.quantize import quantize_weight_blocks


class PreparedWeights(NamedTuple):
    """A rank's weights in aiter's layout: shuffled; float8 with a scale per 128 x 128 block where rows are float8."""

    w1: Tensor
    w2: Tensor
    w1_scale: Tensor | None
    w2_scale: Tensor | None


def prepare_weights(w1: Tensor, w2: Tensor, shuffle: Callable[[Tensor], Tensor], dtype: torch.dtype) -> PreparedWeights:
    """Return w1 [El, 2I, H] and w2 [El, H, I], bf16, in the layout of aiter's kernels: as bf16, or as fp8 `dtype`."""
    if dtype is torch.bfloat16:
        return PreparedWeights(_shuffled(w1, shuffle), _shuffled(w2, shuffle), None, None)
    (narrow1, scale1), (narrow2, scale2) = quantize_weight_blocks(w1, dtype), quantize_weight_blocks(w2, dtype)
    return PreparedWeights(_shuffled(narrow1, shuffle), _shuffled(narrow2, shuffle), scale1, scale2)


def _shuffled(weights: Tensor, shuffle: Callable[[Tensor], Tensor]) -> Tensor:
    """Shuffle, and mark exactly the tensor that is passed on: a slice or copy of it would lose the mark."""
    shuffled = shuffle(weights)
    shuffled.is_shuffled = True  # type: ignore[attr-defined]  # what aiter looks for
    return shuffled
