"""Which experts a token's probes listen to: the code of a layer, and each token's code column."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from distbench.workload.bits import positive_words
from distbench.workload.plan import ExactPlan
from distbench.workload.probe_plan import Code

_WORD_BITS = 64
# Two experts of a token in one group make 2 or more in its lane of a word, which is as wide as their number needs.
_NARROW, _WIDE = 4, 8
_COUNT_BITS = 31
_SEED = 0


@lru_cache(maxsize=4)
def code_groups(plan: ExactPlan, device: torch.device) -> Tensor:
    """Return the group of each expert under each code column, int64 [E, m + 1], and past all groups under none.

    It is the same for all seeds: cases of one shape, of which a suite has many, need not draw it anew.
    """
    experts = plan.num_experts
    rows = torch.arange(plan.code_columns, device=device)
    keys = positive_words(_SEED, "codes", rows, experts, device) << _COUNT_BITS
    keys |= torch.arange(experts, device=device)
    groups = plan.probes.code.groups if plan.probes else 1
    return functional.pad(keys.argsort(dim=1).remainder(groups).t(), (0, 1), value=groups)


def code_columns(plan: ExactPlan, draw: Tensor, ids: Tensor) -> Tensor:
    """Return the code column of each token, int64 [n], m for none, by draw [n], any whole numbers, and ids [n, k].

    It is one under which all experts of the token are in different groups; ids of no expert are passed over.
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
    """Return how far each column is from a first one on, int64 [first, column]."""
    columns = torch.arange(count, device=device)
    return (columns - columns.unsqueeze(1)) % count


@lru_cache(maxsize=4)
def _lanes(plan: ExactPlan, device: torch.device) -> list[tuple[Tensor, int]]:
    """Return for each word of lanes: 1 in the lane of the expert's group, int64 [E + 1, m], and the bits of two."""
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
