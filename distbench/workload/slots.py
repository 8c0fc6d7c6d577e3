"""Slots of tokens: the physical experts that stand for their logical ones, shared experts, and ids of -1.

Experts with weights of their own are *logical*: the routed ones 0 to E - 1, then the shared ones. What dispatch, the
experts and combine see are *physical* ids: rank r holds those from r * El on, first its slots of routed experts, then
one for each shared expert. That is the layout of SGLang 0.5.23 with MoRI (`remap_topk_for_per_rank_shared_slots`):
a token's shared slots are those of its own rank, behind the routed ones.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from distbench.workload.bits import positive_words
from distbench.workload.chunking import rows_at_a_time
from distbench.workload.routing import route, token_keys
from distbench.workload.routing_spec import RANK_KINDS, Routing, Slots

_CHUNK_BYTES = 16 << 20
_ALL_WORDS = 1 << 32


def route_to_slots(routing: Routing, slots: Slots, *, seed: int, ranks: Tensor, tokens: Tensor) -> Tensor:
    """Return the physical experts of any ranks' tokens, ranks and tokens int64 [m] each: int32 [m, k + N].

    Among replicas, `dynamic` takes one at random for each token and slot; `static` takes the own rank's first one, else
    one fixed for the rank and the expert. Both follow `topk_ids_logical_to_physical` of SGLang 0.5.23, whose static map
    also prefers the own node and is spread by a shuffle. A routing that names a rank takes the replica there.
    """
    named = int(routing.parameter) if routing.kind in RANK_KINDS else None
    held = slots.held(named) if slots.experts and named is not None else ()
    ids = route(routing, slots.group, seed=seed, ranks=ranks, tokens=tokens, held=held)
    keys = token_keys(ranks, tokens)
    if slots.experts:
        ids = _replicas(slots, seed, ids, ranks, keys, named)
    if slots.shared:
        ids = _with_shared(slots, ids, ranks)
    return _dropped(slots, seed, ids, keys) if slots.dropped_slots or slots.dropped_tokens else ids


def logical_experts(slots: Slots, device: torch.device) -> Tensor:
    """Return the logical expert of each physical one, int64 [placed experts]; it must not be written to."""
    return _logical(slots.group.num_experts, slots.group.ep_size, slots.experts, slots.shared, device)


@lru_cache(maxsize=4)
def _logical(num_experts: int, ep_size: int, experts: tuple[int, ...], shared: int, device: torch.device) -> Tensor:
    routed = torch.tensor(experts, device=device) if experts else torch.arange(num_experts, device=device)
    own = torch.arange(num_experts, num_experts + shared, device=device).expand(ep_size, -1)
    return torch.cat([routed.view(ep_size, -1), own], dim=1).flatten()


def _with_shared(slots: Slots, ids: Tensor, ranks: Tensor) -> Tensor:
    """Return ids of physical experts [m, k + N] from numbers of routed slots [m, k]."""
    local = slots.routed_per_rank
    routed = ids + ids.div(local, rounding_mode="floor") * slots.shared
    first = ranks * (local + slots.shared) + local
    own = first.unsqueeze(1) + torch.arange(slots.shared, device=ids.device)
    return torch.cat([routed, own.to(ids.dtype)], dim=1)


@lru_cache(maxsize=4)
def _places(num_experts: int, experts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the slots of each expert, int64 [E, most], ascending, the first one repeated; and their number, [E]."""
    placed = torch.tensor(experts)
    counts = torch.bincount(placed, minlength=num_experts)
    order = placed.argsort(stable=True)
    first = counts.cumsum(0) - counts
    column = torch.arange(int(counts.max()))
    places = order[torch.where(column < counts.unsqueeze(1), first.unsqueeze(1) + column, first.unsqueeze(1))]
    return places.to(device), counts.to(device)


def _replicas(  # noqa: PLR0913 - the parts of a choice
    slots: Slots, seed: int, ids: Tensor, ranks: Tensor, keys: Tensor, named: int | None
) -> Tensor:
    """Return the slots that stand for experts `ids` [m, k]: int32 [m, k]."""
    places, counts = _places(slots.group.num_experts, slots.experts, ids.device)
    chosen = torch.empty_like(ids)
    step = rows_at_a_time(_CHUNK_BYTES, ids.shape[1] * places.shape[1] * 8, ids.device)
    for start in range(0, len(ids), step):
        part = slice(start, start + step)
        wanted, rank = ids[part].long(), ranks[part].unsqueeze(1)
        if slots.replica_choice == "static":
            turn = rank + wanted
        else:
            turn = positive_words(seed, "route/replica", keys[part], wanted.shape[1], ids.device)
        found = places[wanted, turn % counts[wanted]]
        near = rank if named is None else torch.full_like(rank, named)
        if named is not None or slots.replica_choice == "static":
            there = places[wanted].div(slots.routed_per_rank, rounding_mode="floor") == near.unsqueeze(2)
            first = there.to(torch.uint8).argmax(2)
            found = torch.where(there.any(2), places[wanted, first], found)
        chosen[part] = found
    return chosen


def _dropped(slots: Slots, seed: int, ids: Tensor, keys: Tensor) -> Tensor:
    """Return ids [m, k + N] with -1 in dropped slots; a token keeps one slot unless it is dropped whole."""
    topk = slots.group.topk
    words = positive_words(seed, "route/dropped", keys, topk, ids.device)
    gone = words < round(slots.dropped_slots * _ALL_WORDS)
    if not slots.shared:
        gone = gone.scatter(1, words.argmax(1, keepdim=True), value=False)
    kept = gone.new_zeros(len(ids), slots.shared)
    whole = positive_words(seed, "route/dropped tokens", keys, 1, ids.device) < round(slots.dropped_tokens * _ALL_WORDS)
    return ids.masked_fill(torch.cat([gone, kept], dim=1) | whole, -1)
