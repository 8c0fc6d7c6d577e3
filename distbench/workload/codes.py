"""Which experts a token's probes listen to: the code of a layer, and each token's code column."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from distbench.workload.bits import positive_words
from distbench.workload.plan import ExactPlan
from distbench.workload.probe_plan import Code

_WORD_BITS = 64
# Two experts of a token in one group make 2 or more in its lane of a word, which is as wide as their number needs.
_NARROW, _WIDE = 4, 8
_COUNT_BITS = 31


@lru_cache(maxsize=4)
def code_groups(plan: ExactPlan, seed: int, device: torch.device) -> Tensor:
    """Return the group of each expert under each code column, int64 [E, m]: a keyed permutation of the experts each."""
    experts = plan.num_experts
    rows = torch.arange(plan.code_columns, device=device)
    keys = positive_words(seed, "codes", rows, experts, device) << _COUNT_BITS
    keys |= torch.arange(experts, device=device)
    groups = plan.probes.code.groups if plan.probes else 1
    return keys.argsort(dim=1).remainder(groups).t().contiguous()


def code_columns(plan: ExactPlan, seed: int, keys: Tensor, ids: Tensor) -> Tensor:
    """Return the code column of tokens numbered `keys` int64 [n] with experts `ids` [n, k]: int64 [n], m for none.

    It is drawn among those under which all experts of the token are in different groups; ids of no expert are passed
    over.
    """
    count = plan.code_columns
    used = torch.where((ids < 0) | (ids >= plan.num_experts), plan.num_experts, ids).flatten()
    twice = None
    for table, several in _lanes(plan, seed, keys.device):
        members = table.index_select(0, used).view(*ids.shape, count).sum(1)
        doubled = (members & several) != 0
        twice = doubled if twice is None else twice | doubled
    start = positive_words(seed, "code", keys, 1, keys.device).remainder_(count)
    order = (torch.arange(count, device=keys.device) - start).remainder_(count)
    if twice is not None:
        order = order.masked_fill_(twice, count)
    first, column = order.min(1)
    return torch.where(first < count, column, count)


@lru_cache(maxsize=4)
def _lanes(plan: ExactPlan, seed: int, device: torch.device) -> list[tuple[Tensor, int]]:
    """Return for each word of lanes: 1 in the lane of the expert's group, int64 [E + 1, m], and the bits of two."""
    code = plan.probes.code if plan.probes else Code(groups=1, columns=0, missing=0.0)
    width = _NARROW if plan.topk < 1 << _NARROW else _WIDE
    lanes = _WORD_BITS // width
    groups = code_groups(plan, seed, device)
    groups = torch.cat([groups, groups.new_full((1, groups.shape[1]), -1)])
    several = sum((((1 << width) - 2) << (lane * width)) for lane in range(lanes))
    several -= (1 << _WORD_BITS) if several >> (_WORD_BITS - 1) else 0
    tables = []
    for first in range(0, code.groups, lanes):
        lane = groups - first
        inside = (lane >= 0) & (lane < lanes) & (groups >= 0)
        one = torch.ones_like(lane) << torch.where(inside, lane, 0) * width
        tables.append((torch.where(inside, one, 0), several))
    return tables
