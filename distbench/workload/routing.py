"""Experts of tokens, by integer arithmetic only: any rank computes any rank's routing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.case.trace_name import KIND, TraceName
from distbench.workload.batch import TokenBatch
from distbench.workload.bits import positive_words, shuffle, smallest
from distbench.workload.chunking import rows_at_a_time
from distbench.workload.routing_spec import RANK_KINDS, ExpertGroup, Routing, recorded_slice

_CHUNK_BYTES = 16 << 20

# Logarithms in fixed point with 20 fractional bits; uniform numbers in (0, 1) in steps of 2**-12.
_POINT_BITS = 20
_UNIFORM_BITS = 12
_TIE_BITS = 8


def token_keys(ranks: Tensor, tokens: Tensor) -> Tensor:
    """Return a unique number for each token, int64 [m], from ranks and tokens int64 [m], below 2**31."""
    return (ranks << 31) | tokens


def route(  # noqa: PLR0913 - the parts of a routing
    routing: Routing, group: ExpertGroup, *, seed: int, ranks: Tensor, tokens: Tensor, held: Sequence[int] = ()
) -> Tensor:
    """Return the experts of any ranks' tokens: int32 [m, k], distinct global ids, in random slot order.

    ranks, tokens int64 [m] are on the device of the result. `held` are the experts of the rank that the routing names,
    ascending; empty where ranks hold consecutive ones. `check_routing` has accepted the routing.
    """
    if routing.kind in RANK_KINDS and not held:
        first = int(routing.parameter) * group.experts_per_rank
        held = range(first, first + group.experts_per_rank)
    keys = token_keys(ranks, tokens)
    step = rows_at_a_time(_CHUNK_BYTES, group.num_experts * 8, keys.device)
    if keys.numel() <= step:
        return _CHOOSERS[routing.kind](_Choice(routing, group, seed, keys, held)).to(torch.int32)
    chosen = torch.empty(keys.numel(), group.topk, dtype=torch.int32, device=keys.device)
    for start in range(0, keys.numel(), step):
        choice = _Choice(routing, group, seed, keys[start : start + step], held)
        chosen[start : start + step] = _CHOOSERS[routing.kind](choice)
    return chosen


def destinations(ids: Tensor, experts_per_rank: int, ep_size: int) -> Tensor:
    """Return the destination ranks of each token: bool [n, W] from ids [n, k].

    An id below 0 or from E up has no destination.
    """
    owner = ids.long().div(experts_per_rank, rounding_mode="floor")
    owner = torch.where((owner < 0) | (owner >= ep_size), ep_size, owner)
    going = torch.zeros(ids.shape[0], ep_size + 1, dtype=torch.bool, device=ids.device)
    return going.scatter_(1, owner, value=True)[:, :ep_size]


def are_local(ids: Tensor, rank: int, experts_per_rank: int) -> Tensor:
    """Return which ids are those of experts on `rank`: bool [n, k] from ids [n, k]."""
    first = rank * experts_per_rank
    return (ids >= first) & (ids < first + experts_per_rank)


def local_slots(batch: TokenBatch, rank: int, experts_per_rank: int) -> TokenBatch:
    """Return rows as they arrive on `rank` where slots of other ranks' experts are not moved: id -1 and weight 0."""
    here = are_local(batch.ids, rank, experts_per_rank)
    return batch._replace(weights=batch.weights.where(here, 0.0), ids=batch.ids.where(here, -1))


def recv_counts(ids: Tensor, experts_per_rank: int, ep_size: int) -> Tensor:
    """Return the number of these tokens that each rank receives, duplicates merged: int64 [W]."""
    return destinations(ids, experts_per_rank, ep_size).sum(0)


class _Choice(NamedTuple):
    """Inputs of a chooser: the routing, the group, the seed, the tokens' keys int64 [m], the named rank's experts."""

    routing: Routing
    group: ExpertGroup
    seed: int
    keys: Tensor
    held: Sequence[int]

    def distinct(self, stream: str, candidates: int, count: int) -> Tensor:
        """Return `count` distinct numbers below `candidates` for each token, in random order: int64 [m, count]."""
        keys = positive_words(self.seed, f"route/{stream}", self.keys, candidates, self.keys.device)
        return smallest(keys, count)


def _uniform(choice: _Choice) -> Tensor:
    return choice.distinct("uniform", choice.group.num_experts, choice.group.topk)


def _zipf(choice: _Choice) -> Tensor:
    """Draw without replacement, with popularity 1 / position**S: the k smallest of exponentials over weights.

    Computed in logarithms (the Gumbel race): ln(-ln u) + S * ln(position), which no S can overflow.
    """
    device, experts = choice.keys.device, choice.group.num_experts
    bits = positive_words(choice.seed, "route/zipf", choice.keys, experts, device)
    race = _log_exponentials(device)[bits >> (32 - _UNIFORM_BITS)]
    race += _log_handicaps(choice.routing.parameter, choice.seed, experts, device)
    keys = ((race + (16 << _POINT_BITS)) << _TIE_BITS) | (bits & ((1 << _TIE_BITS) - 1))
    return smallest(keys, choice.group.topk)


def _hot_rank(choice: _Choice) -> Tensor:
    group, device = choice.group, choice.keys.device
    held = torch.tensor(choice.held, device=device)
    elsewhere = torch.ones(group.num_experts, dtype=torch.bool, device=device)
    elsewhere = elsewhere.index_fill(0, held, value=False).nonzero().flatten()
    hot = max(min(-(-group.topk // 2), len(held)), group.topk - len(elsewhere))
    there = held[choice.distinct("hot", len(held), hot)]
    if hot == group.topk:
        return there
    others = elsewhere[choice.distinct("cold", len(elsewhere), group.topk - hot)]
    order = choice.distinct("slots", group.topk, group.topk)
    return torch.cat([there, others], dim=1).gather(1, order)


def _fan_in(choice: _Choice) -> Tensor:
    held = torch.tensor(choice.held, device=choice.keys.device)
    return held[choice.distinct("fan-in", len(held), choice.group.topk)]


def _local(choice: _Choice) -> Tensor:
    local = choice.group.experts_per_rank
    return choice.distinct("local", local, choice.group.topk) + (choice.keys >> 31).unsqueeze(1) * local


def _duplicates(choice: _Choice) -> Tensor:
    """Alternate between two ranks (more where two hold too few experts), so that a rank's slots are not adjacent."""
    group, local = choice.group, choice.group.experts_per_rank
    num_owners = min(max(-(-group.topk // local), 2), group.ep_size)
    owners = choice.distinct("owners", group.ep_size, num_owners)
    per_owner = -(-group.topk // num_owners)
    parts = [choice.distinct(f"owner/{turn}", local, per_owner) for turn in range(num_owners)]
    interleaved = torch.stack(parts, dim=2) + owners.unsqueeze(1) * local
    return interleaved.flatten(1)[:, : group.topk].contiguous()


def _recorded(choice: _Choice) -> Tensor:
    """Recorded experts of each rank's tokens. A token that was not recorded, which no case has, takes another's."""
    assert choice.routing.trace is not None  # noqa: S101 - parse_routing
    recording = _recording(choice.routing.trace, choice.keys.device)
    return recording.ids[recording.places(choice.keys)]


def recorded_weights(routing: Routing, keys: Tensor) -> Tensor | None:
    """Return the recorded routing weights of the tokens with keys int64 [m]: float32 [m, k]; None where none are."""
    if routing.trace is None:
        return None
    recording = _recording(routing.trace, keys.device)
    return None if recording.weights is None else recording.weights[recording.places(keys)]


def recorded_places(trace: TraceName, keys: Tensor) -> Tensor:
    """Return the recorded rows of the tokens with keys int64 [m]; of a token that was not recorded, another's."""
    return _recording(trace, keys.device).places(keys)


class _Recording(NamedTuple):
    """Recorded experts int64 [n, k], weights float32 [n, k] or None, and the place of each rank's first token, [W]."""

    ids: Tensor
    weights: Tensor | None
    first: Tensor

    def places(self, keys: Tensor) -> Tensor:
        """Places of the tokens with keys int64 [m]; of a token that was not recorded, another's."""
        places = self.first[(keys >> 31).clamp(0, len(self.first) - 1)] + (keys & ((1 << 31) - 1))
        return places.clamp(0, len(self.ids) - 1)


@lru_cache(maxsize=4)
def _recording(trace: TraceName, device: torch.device) -> _Recording:
    recorded = recorded_slice(trace)
    tokens = torch.from_numpy(recorded.tokens)
    weights = None if recorded.weights is None else torch.from_numpy(recorded.weights).to(device)
    return _Recording(torch.from_numpy(recorded.ids).long().to(device), weights, (tokens.cumsum(0) - tokens).to(device))


_CHOOSERS = {
    "uniform": _uniform,
    "zipf": _zipf,
    "hot-rank": _hot_rank,
    "fan-in": _fan_in,
    "local": _local,
    "duplicates": _duplicates,
    KIND: _recorded,
}


@lru_cache(maxsize=8)
def _log_exponentials(device: torch.device) -> Tensor:
    """ln(-ln u) in fixed point for each step of u, int64 [2**12]; all are above -10."""
    steps = 1 << _UNIFORM_BITS
    values = (math.log(-math.log((step + 0.5) / steps)) for step in range(steps))
    return torch.tensor([round(value * (1 << _POINT_BITS)) for value in values], device=device)


@lru_cache(maxsize=8)
def _log_handicaps(exponent: float, seed: int, num_experts: int, device: torch.device) -> Tensor:
    """S * ln(position) in fixed point for each expert, int64 [E]; the order of popularity is a seeded permutation."""
    position = shuffle(seed, "route/popularity", 0, num_experts, "cpu")
    values = [round(exponent * math.log(place + 1) * (1 << _POINT_BITS)) for place in range(num_experts)]
    return torch.tensor(values)[position].to(device)
