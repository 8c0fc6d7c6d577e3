"""Rows that low-latency kernels have received, a block for each expert, as one row for each token."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distbench.errors import DistbenchError
from distbench.transport.base import poison_

_BEGIN_BITS = 32
"""A block's range has its first place above these bits, and its number of rows in them."""


class Routing(NamedTuple):
    """Ids int32 and weights float32 [W, n, k] of all ranks' tokens, the first expert of this rank, and M."""

    ids: Tensor
    weights: Tensor
    first_expert: int
    most: int


class Arrivals(NamedTuple):
    """Tokens that arrived: sources int64 [m, 2], hidden bf16 [m, H], weights [m, k] and ids [m, k].

    `places` int64 [a] are all rows that arrived, numbered over the blocks; `carriers` int64 [m] those of each token's
    first slot on this rank.
    """

    sources: Tensor
    hidden: Tensor
    weights: Tensor
    ids: Tensor
    places: Tensor
    carriers: Tensor


class _Found(NamedTuple):
    """Each row that arrived: its place, its expert's number on this rank, and source rank * M + token, int64 [a]."""

    places: Tensor
    experts: Tensor
    keys: Tensor


def read_arrivals(rows: Tensor, counts: Tensor, tokens: Tensor, ranges: Tensor, routing: Routing) -> Arrivals:
    """The rows that DeepEP has received; waits for the device.

    rows bf16 [El, W * M, H], counts int32 [El], tokens int32 [El, W * M]: source tokens; ranges int64 [El, W]: the
    places of each source rank. An id stands in the slot that the routing gives it; one that the routing has not sent
    here stands in slot 0, and is wrong there. Copies of a token that differ make its row poison.

    Raises:
        DistbenchError: the counts contradict the ranges, a token is none, or an expert got one twice.
    """
    found = _found(counts, tokens, ranges, routing.most)
    keys, row = found.keys.unique(return_inverse=True)
    if len((row * len(rows) + found.experts).unique()) < len(row):
        message = "dispatch: an expert received a token twice"
        raise DistbenchError(message)
    rank, token = keys.div(routing.most, rounding_mode="floor"), keys % routing.most
    known = token.clamp(max=max(routing.ids.shape[1] - 1, 0))
    wanted, shares = routing.ids[rank, known], routing.weights[rank, known]
    number = (found.experts + routing.first_expert).int()
    slot = (wanted[row] == number.unsqueeze(1)).byte().argmax(1)
    ids = torch.full_like(wanted, -1)
    ids[row, slot] = number
    order = (row * ids.shape[1] + slot).argsort()
    sorted_rows = row[order]
    first = torch.ones_like(sorted_rows, dtype=torch.bool)
    first[1:] = sorted_rows[1:] != sorted_rows[:-1]
    carriers = found.places[order[first]]
    return Arrivals(
        sources=torch.stack([rank, token], dim=1),
        hidden=_agreed(rows.view(-1, rows.shape[2]), found.places, carriers, row),
        weights=shares.where(ids >= 0, 0.0),
        ids=ids,
        places=found.places,
        carriers=carriers,
    )


def _found(counts: Tensor, tokens: Tensor, ranges: Tensor, most: int) -> _Found:
    """Return the rows that the ranges cover, in the order of their places."""
    number = torch.arange(tokens.shape[1], device=tokens.device)
    owner = torch.full(tokens.shape, -1, device=tokens.device)
    for rank, ends in enumerate(ranges.unbind(1)):
        begin = (ends >> _BEGIN_BITS).unsqueeze(1)
        size = (ends & ((1 << _BEGIN_BITS) - 1)).unsqueeze(1)
        owner = owner.masked_fill((number >= begin) & (number < begin + size), rank)
    places = (owner.flatten() >= 0).nonzero()[:, 0]
    source = tokens.flatten()[places].long()
    total = int(counts.sum())
    if total != len(places) or bool(((source < 0) | (source >= most)).any()):
        message = f"dispatch: DeepEP counts {total} rows, its ranges {len(places)}, of tokens up to {most - 1}"
        raise DistbenchError(message)
    experts = places.div(tokens.shape[1], rounding_mode="floor")
    return _Found(places, experts, owner.flatten()[places] * most + source)


def _agreed(rows: Tensor, places: Tensor, carriers: Tensor, row: Tensor) -> Tensor:
    """Return the rows at `carriers`; those of which a copy differs are poison."""
    hidden = rows[carriers]
    differs = (rows[places].view(torch.int16) != hidden[row].view(torch.int16)).any(1)
    wrong = hidden[row[differs].unique()]
    poison_(wrong)
    hidden[row[differs].unique()] = wrong
    return hidden
