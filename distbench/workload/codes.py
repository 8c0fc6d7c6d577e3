"""Experts that a token's probes listen to: the code of a layer, and each token's code column."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from distbench.workload.bits import positive_words
from distbench.workload.exact_plan import ExactPlan
from distbench.workload.probe_plan import Code

_WORD_BITS = 64
# Two experts of a token in one group add up to 2 or more in the group's lane of a word; a lane is as wide as topk
# needs.
_NARROW, _WIDE = 4, 8
_COUNT_BITS = 31
_SEED = 0


@lru_cache(maxsize=4)
def code_groups(plan: ExactPlan, device: torch.device) -> Tensor:
    """Return the group of each expert under each code column, int64 [E, m + 1]; the last column, no code, has no group.

    The code is the same for all seeds, so cases of one shape, of which a suite has many, share it.
    """
    experts = plan.num_experts
    rows = torch.arange(plan.code_columns, device=device)
    keys = positive_words(_SEED, "codes", rows, experts, device) << _COUNT_BITS
    keys |= torch.arange(experts, device=device)
    groups = plan.probes.code.groups if plan.probes else 1
    return functional.pad(keys.argsort(dim=1).remainder(groups).t(), (0, 1), value=groups)


def code_columns(plan: ExactPlan, draw: Tensor, ids: Tensor) -> Tensor:
    """Return the code column of each token, int64 [n], m for none; draw [n] holds any whole numbers, ids is [n, k].

    Under its code column all experts of the token are in different groups. Ids that name no expert are ignored.
    """
    count = plan.code_columns
    used = torch.where((ids < 0) | (ids >= plan.num_experts), plan.num_experts, ids).flatten()
    order = _turned(count, ids.device).index_select(0, draw % count)
    for table, several in _lanes(plan, ids.device):
        members = table.index_select(0, used).view(*ids.shape, count).sum(1)
        order = order.masked_fill((members & several) != 0, count)
    first, column = order.min(1)
    return torch.where(first < count, column, count)


@lru_cache(maxsize=8)
def _turned(count: int, device: torch.device) -> Tensor:
    """Return the distance of each column from each first column, modulo their number: int64 [first, column]."""
    columns = torch.arange(count, device=device)
    return (columns - columns.unsqueeze(1)) % count


@lru_cache(maxsize=4)
def _lanes(plan: ExactPlan, device: torch.device) -> list[tuple[Tensor, int]]:
    """Return words of lanes and masks of counts above 1: int64 [E + 1, m], with 1 in the lane of the expert's group."""
    code = plan.probes.code if plan.probes else Code(groups=1, columns=0, missing=0.0)
    width = _NARROW if plan.topk < 1 << _NARROW else _WIDE
    lanes = _WORD_BITS // width
    several = sum((((1 << width) - 2) << (lane * width)) for lane in range(lanes))
    several -= (1 << _WORD_BITS) if several >> (_WORD_BITS - 1) else 0
    groups, tables = code_groups(plan, device)[:, :-1], []
    for first in range(0, code.groups, lanes):
        lane = (groups - first).clamp_(0, lanes - 1)
        inside = (lane == groups - first).long()
        tables.append((functional.pad(inside << lane * width, (0, 0, 0, 1)), several))
    return tables
