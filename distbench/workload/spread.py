"""Places of entries: keyed walks through all places, so that every place is taken and none comes twice in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.workload.bits import words_of_streams

# Products of steps and factors below this are taken in int32, whose remainders cost a third.
_INT32 = 1 << 31


class Grid(NamedTuple):
    """An expert's rows, the entries of each, and the places that they are spread over."""

    rows: int
    entries: int
    places: int


class _Walk(NamedTuple):
    """How a grid's rows go through its places, pass after pass; `sharing` experts in a sequence walk on together.

    A pass is a run of rows that is long enough for all places. turns int64 [sharing, rows] are the passes of rows,
    steps int32 or int64 [sharing, entries, rows] say where in them an entry comes.
    """

    sharing: int
    num_turns: int
    turns: Tensor
    steps: Tensor

    def of(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the turns and steps of `experts` int64 [e], instead of those of a sequence of experts."""
        if self.sharing == 1:
            return self.turns.expand(len(experts), -1), self.steps
        place = experts % self.sharing
        return self.turns[place], self.steps[place]


@lru_cache(maxsize=32)
def _walk(grid: Grid, device: torch.device) -> _Walk:
    pass_rows = -(-grid.places // grid.entries)
    sharing = -(-pass_rows // grid.rows)
    rows = torch.arange(sharing * grid.rows, device=device).view(sharing, 1, grid.rows)
    turns = rows.div(pass_rows, rounding_mode="floor")
    steps = (rows - turns * pass_rows) * grid.entries + torch.arange(grid.entries, device=device).unsqueeze(1)
    steps = steps.to(torch.int32 if (pass_rows * grid.entries + 1) * grid.places < _INT32 else torch.int64)
    return _Walk(sharing, -(-sharing * grid.rows // pass_rows), turns.squeeze(1), steps)


def spread(seed: int, experts: Tensor, grids: Mapping[str, Grid]) -> list[Tensor]:
    """Return the place of each entry, int32 [e, entries, rows] for each grid: distinct in a row, all in every pass.

    In a pass row * entries + entry goes through one keyed affine bijection of the places.
    """
    walks = [_walk(grid, experts.device) for grid in grids.values()]
    groups = torch.stack([experts.div(walk.sharing, rounding_mode="floor") for walk in walks])
    streams = [f"spread/{name}" for name in grids]
    words = words_of_streams(seed, streams, groups, 2 * max(walk.num_turns for walk in walks)).long() & 0xFFFF_FFFF
    each = zip(grids.values(), walks, words.unbind(0), strict=True)
    return [_places(experts, grid, walk, keys) for grid, walk, keys in each]


def _places(experts: Tensor, grid: Grid, walk: _Walk, keys: Tensor) -> Tensor:
    """Return the places int32 [e, entries, rows] by keys int64 [e, 2 * num_turns or more], of 32 bits."""
    turns, steps = walk.of(experts)
    units = _units(grid.places, experts.device)
    factors = units[keys[:, : walk.num_turns] % units.numel()].to(steps.dtype)
    offsets = (keys[:, walk.num_turns : 2 * walk.num_turns] % grid.places).to(steps.dtype)
    if walk.num_turns > 1:
        factors, offsets = factors.gather(1, turns), offsets.gather(1, turns)
    places = steps * factors.unsqueeze(1)
    places += offsets.unsqueeze(1)
    return places.remainder_(grid.places).to(torch.int32)


@lru_cache(maxsize=32)
def _units(modulus: int, device: torch.device) -> Tensor:
    """Numbers that have no divisor in common with `modulus`: multiplying by one of them permutes the residues."""
    return torch.tensor([unit for unit in range(1, modulus + 1) if math.gcd(unit, modulus) == 1], device=device)
