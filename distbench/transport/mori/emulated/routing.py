"""Rank of each top-k slot, by kernel type: destinations of a token, and the order of sums."""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.transport.mori.emulated import quirks

_LL_SLOTS = 8


class EpDispatchCombineKernelType(Enum):
    """The wheel's kernel types with its numbers; InterNode, the first of them, is not imitated."""

    IntraNode = 0
    InterNode = 1
    InterNodeV1 = 2
    InterNodeV1LL = 3
    AsyncLL = 4
    IntraNodeLL = 5

    def __str__(self) -> str:
        """Return the bare name."""
        return self.name


INTRA = (EpDispatchCombineKernelType.IntraNode, EpDispatchCombineKernelType.IntraNodeLL)
TWO_LEVELS = (EpDispatchCombineKernelType.InterNodeV1, EpDispatchCombineKernelType.InterNodeV1LL)
_SKIPS_NEGATIVE = (*INTRA, EpDispatchCombineKernelType.InterNodeV1)


class Shape(NamedTuple):
    """Inputs of routing besides the ids."""

    kernel: EpDispatchCombineKernelType
    world_size: int
    experts_per_rank: int


def owners(ids: Tensor, shape: Shape) -> Tensor:
    """Return the rank of each id's expert as the kernel computes it, int64 [n, k]; W where it drops the slot."""
    truncated = torch.div(ids.long(), shape.experts_per_rank, rounding_mode="trunc")
    if shape.kernel in _SKIPS_NEGATIVE:
        truncated = torch.where(ids < 0, shape.world_size, truncated)
    elif shape.kernel is EpDispatchCombineKernelType.InterNodeV1LL and bool((truncated < 0).any()):
        quirks.trap("assertion failed: lanePe >= 0")
    past = ids >= shape.world_size * shape.experts_per_rank
    if shape.kernel in TWO_LEVELS and bool(past.any()):
        quirks.trap("assertion failed: lanePe < worldSize")
    return torch.where((truncated < 0) | past, shape.world_size, truncated)


def representatives(ids: Tensor, shape: Shape) -> Tensor:
    """Return the rank that each slot represents, int64 [n, k]; W if another slot represents it, or if dropped."""
    owner = owners(ids, shape)
    same = owner.unsqueeze(2) == owner.unsqueeze(1)
    if shape.kernel is not EpDispatchCombineKernelType.IntraNodeLL:
        return owner.masked_fill(same.tril(-1).any(2), shape.world_size)
    seen = torch.arange(ids.shape[1], device=ids.device) < (
        ids.shape[1] if quirks.has(quirks.LL_ALL_SLOTS) else _LL_SLOTS
    )
    later = (same & seen).triu(1).any(2)
    return owner.masked_fill(later | ~seen, shape.world_size)
