"""Expected output of combine: each token's contributions, fetched from the ranks that returned them, and summed.

The transport under test is trusted only for its stated order of addition. A difference is therefore combine's own,
whatever went wrong before it and whether or not inputs are exact.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.distributed.exchange import Exchange
from distbench.transport.sum_order import SumOrder
from distbench.verify.row_compare import integer_view
from distbench.workload.chunking import rows_at_a_time
from distbench.workload.routing import destinations
from distbench.workload.routing_spec import ExpertGroup

_ROUND_BYTES = 16 << 20
_TOKEN_BITS = 32


class Returned(NamedTuple):
    """Rows that one rank gave to combine: keys int64 [m], rank << 32 | token, ascending; rows [m, H]."""

    keys: Tensor
    rows: Tensor


def together(parts: Sequence[Returned]) -> Returned:
    """The rows that a rank gave to several combines, of different tokens, as one."""
    keys, order = torch.cat([one.keys for one in parts]).sort()
    return Returned(keys, torch.cat([one.rows for one in parts])[order])


class Contributions(NamedTuple):
    """Rows that ranks returned for some tokens, in order of addition: rows [n, c, H], ranks int64 [n, c], else -1."""

    rows: Tensor
    ranks: Tensor

    def take(self, index: Tensor | slice) -> Contributions:
        """Return the contributions of the tokens `index`, [m] or a slice."""
        return Contributions(self.rows[index], self.ranks[index])


def key_of(ranks: Tensor, tokens: Tensor) -> Tensor:
    """Return the sort key of received rows, int64 [m]."""
    return (ranks << _TOKEN_BITS) | tokens


def split_key(keys: Tensor) -> tuple[Tensor, Tensor]:
    """Return source ranks and source tokens."""
    return keys >> _TOKEN_BITS, keys & ((1 << _TOKEN_BITS) - 1)


def added(contributions: Contributions, order: SumOrder) -> Tensor:
    """Return the sum of each token's contributions as combine must compute it: [n, H] of the rows' dtype."""
    rows, ranks = contributions
    if not order.node_ranks:
        return _added_in_order(rows).to(rows.dtype)
    nodes = ranks.div(order.node_ranks, rounding_mode="floor")
    total = torch.zeros_like(rows[:, 0], dtype=torch.float32)
    for node in range(int(nodes.max()) + 1 if nodes.numel() else 0):
        here = torch.where((nodes == node).unsqueeze(2), rows, torch.zeros_like(rows))
        total += _added_in_order(here).to(rows.dtype)
    return total.to(rows.dtype)


def same_bits_or_nan(actual: Tensor, expected: Tensor) -> Tensor:
    """Whether rows [n, H] have the same bits, bool [n]; all NaNs are equal, because machines differ in theirs."""
    nan = actual.isnan() & expected.isnan()
    return ((integer_view(actual) == integer_view(expected)) | nan).all(1)


class Slots(NamedTuple):
    """The rows that some tokens get back: their number from each rank, places and ranks int64 [n, c].

    `places` refer to rows ordered by rank and then by token, one for each destination rank of a token.
    """

    arriving: list[int]
    places: Tensor
    ranks: Tensor

    def arranged(self, rows: Tensor) -> Contributions:
        """Arrange rows [m, H] by token and slot."""
        padded = torch.cat([rows, rows.new_zeros(1, rows.shape[1])])
        taken = padded.index_select(0, self.places.flatten())
        return Contributions(taken.view(*self.places.shape, rows.shape[1]), self.ranks)


def slots_of(ids: Tensor, group: ExpertGroup, order: SumOrder) -> Slots:
    """Return the places of rows for tokens with `ids` [n, k]."""
    going = destinations(ids, group.experts_per_rank, group.ep_size)
    position = (going.t().flatten().cumsum(0) - 1).view(group.ep_size, len(ids))
    ranks = _standing(ids, group, order)
    index = position[ranks.clamp(min=0), torch.arange(len(ids), device=ids.device).unsqueeze(1)]
    arriving: list[int] = going.sum(0).tolist()
    return Slots(arriving, torch.where(ranks < 0, sum(arriving), index), ranks)


class OwnSlots:
    """The `Slots` of one rank's tokens with ids [n, k]; those of all of them together are computed once."""

    def __init__(self, ids: Tensor, group: ExpertGroup, order: SumOrder) -> None:
        self.ids, self.order, self._group = ids, order, group
        self.ep_size = group.ep_size
        self._whole: Slots | None = None

    def of(self, tokens: Tensor | slice) -> Slots:
        """Return the places of rows for distinct tokens, ascending: int64 [m], or a slice."""
        all_of_them = isinstance(tokens, Tensor) and len(tokens) == len(self.ids)
        if not all_of_them and len(ids := self.ids[tokens]) < len(self.ids):
            return slots_of(ids, self._group, self.order)
        if self._whole is None:
            self._whole = slots_of(self.ids, self._group, self.order)
        return self._whole


def recounted(
    exchange: Exchange, rank: int, returned: Returned, own: OwnSlots, most: int
) -> Iterator[tuple[int, Contributions]]:
    """Yield, for each block, its first token and all ranks' rows for its tokens. Collective.

    `own` are `rank`'s tokens; no rank has more than `most`. A block's rows take at most `_ROUND_BYTES` on any rank of
    the CPU, 16 times that on a device, or are those of one token of each rank.
    """
    row_bytes = returned.rows.shape[1] * returned.rows.element_size()
    step = tokens_of_a_round(row_bytes, own.ep_size, returned.rows.device)
    owners, tokens = split_key(returned.keys)
    for start in range(0, most, step):
        slots, rows = own.of(slice(start, start + step)), returned.rows
        leaving = owners
        if step < most:
            asked = (tokens >= start) & (tokens < start + step)
            leaving, rows = owners[asked], rows[asked]
        sent: list[int] = torch.bincount(leaving, minlength=own.ep_size).tolist()
        yield start, slots.arranged(exchanged(exchange, rank, rows, sent, slots.arriving))


def tokens_of_a_round(row_bytes: int, ep_size: int, device: torch.device) -> int:
    """Tokens of each rank in a block of `recounted`, whose rows have so many bytes."""
    return rows_at_a_time(_ROUND_BYTES, row_bytes * ep_size, device)


def _standing(ids: Tensor, group: ExpertGroup, order: SumOrder) -> Tensor:
    """Return the ranks of each token's slots, each rank once, in order: int64 [n, min(k, W)], -1 past the last."""
    owner = ids.long().div(group.experts_per_rank, rounding_mode="floor")
    owner = torch.where((owner < 0) | (owner >= group.ep_size), -1, owner)
    same = owner.unsqueeze(2) == owner.unsqueeze(1)
    doubled = (same.triu(1) if order.last_slot else same.tril(-1)).any(2)
    owner = owner.masked_fill(doubled, -1)
    if order.by_rank:
        owner = owner.masked_fill(owner < 0, group.ep_size).sort(dim=1).values
        owner = owner.masked_fill(owner == group.ep_size, -1)
    first = (owner < 0).to(torch.uint8).argsort(dim=1, stable=True)[:, : group.ep_size]
    return owner.gather(1, first)


def _added_in_order(rows: Tensor) -> Tensor:
    first, *others = rows.unbind(1)
    total = first.float().add(0.0)  # a sum from +0.0 has no -0.0
    for one in others:
        total += one
    return total


def exchanged(exchange: Exchange, rank: int, rows: Tensor, leaving: Sequence[int], arriving: Sequence[int]) -> Tensor:
    """Send rows [m, H], `leaving` of them to each rank in turn; return the arriving rows by rank. Collective."""
    mine = slice(sum(leaving[:rank]), sum(leaving[: rank + 1]))
    if mine == slice(0, len(rows)) and len(leaving) == 1:
        return rows
    outgoing = torch.cat([rows[: mine.start], rows[mine.stop :]])
    found = rows.new_empty(sum(arriving) - arriving[rank], rows.shape[1])
    received, sent = ([0 if peer == rank else count for peer, count in enumerate(one)] for one in (arriving, leaving))
    exchange.run(found.view(torch.uint8), outgoing.view(torch.uint8), received, sent)
    before = sum(arriving[:rank])
    return torch.cat([found[:before], rows[mine], found[before:]])
