"""Combine's arithmetic: contributions arranged, then added in slot order, on one level or node by node."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distbench.transport.mori.emulated.codec import Codec
from distbench.transport.mori.emulated.heap import Region
from distbench.transport.mori.emulated.routing import Shape, owners
from distbench.workload.quantize import saturated


class Returned(NamedTuple):
    """Returned expert rows, uint8 [m, width], each with its source rank and its token."""

    rows: Tensor
    ranks: Tensor
    tokens: Tensor
    weights: Tensor | None
    codec: Codec
    ids: Tensor
    columns: int
    dtype: torch.dtype


class Staged(NamedTuple):
    """Place of a rank's contribution to a token: in a region of the heap, or among rows that `places` indexes."""

    source: Region | Tensor
    places: Tensor | None
    most: int
    width: int

    def rows(self, ranks: Tensor, tokens: Tensor) -> Tensor:
        """Return the contributions of ranks [m] to tokens [m]: uint8 [m, width]."""
        place = ranks * self.most + tokens
        if isinstance(self.source, Region):
            return self.source.take(place, self.width)
        return self.source[place if self.places is None else self.places[place]]


def stage(back: Returned, rows: Tensor, shape: Shape, most: int, region: Region | None) -> Staged:
    """Put rows uint8 [m, width] where the sum reads them: at (expert rank * M + token) of `region`, or off the heap."""
    place = back.ranks * most + back.tokens
    if region is not None:
        region.put(place, rows)
        return Staged(region, None, most, rows.shape[1])
    places = back.tokens.new_zeros(shape.world_size * most + 1)
    places[place] = torch.arange(place.numel(), device=place.device)
    return Staged(rows, places, most, rows.shape[1])


def sum_slots(codec: Codec, staged: Staged, route: Tensor, shape: Shape, columns: int) -> Tensor:
    """Return float32 [n, columns]: contributions added from +0.0 in slot order; route [n, k] as `representatives`."""
    total = torch.zeros(route.shape[0], columns, device=route.device)
    for slot in range(route.shape[1]):
        token = (route[:, slot] < shape.world_size).nonzero().flatten()
        if token.numel():
            total[token] = codec.add(total[token], staged.rows(route[token, slot], token))
    return total


class NodeSums:
    """Sums within each node, rounded, then added in node order. A node's sums stay until the next call."""

    def __init__(self, shape: Shape, gpu_per_node: int, most: int) -> None:
        """Allocate the sums; `most` is M, and nodes have `gpu_per_node` ranks."""
        self._shape, self._per_node, self._most = shape, gpu_per_node, most
        self._partials = torch.zeros(0)

    def add(self, back: Returned, staged: Staged, route: Tensor) -> Tensor:
        """Return the tokens' sums, float32 [n, H].

        Participating nodes are read from the ids passed to combine; a node that received nothing contributes an earlier
        call's sums.
        """
        nodes, tokens = self._shape.world_size // self._per_node, route.shape[0]
        wanted = (nodes, max(self._most, tokens), back.columns)
        if self._partials.shape != wanted:
            self._partials = torch.zeros(wanted, device=route.device)
        asked = owners(back.ids, self._shape) // self._per_node
        total = torch.zeros(tokens, back.columns, device=route.device)
        for node in range(nodes):
            here = route.masked_fill(route // self._per_node != node, self._shape.world_size)
            sent = (here < self._shape.world_size).any(1).nonzero().flatten()
            partial = sum_slots(back.codec, staged, here, self._shape, back.columns)
            self._partials[node, sent] = back.codec.round(partial)[sent]
            adding = (asked == node).any(1).nonzero().flatten()
            total[adding] += self._partials[node, adding]
        return total


def cast(total: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a float32 sum in the rows' dtype; fp8 saturates."""
    return saturated(total, dtype) if dtype.itemsize == 1 else total.to(dtype)
