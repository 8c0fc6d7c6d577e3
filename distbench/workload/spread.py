"""Places of entries: keyed permutations of all places, so that every place is used and none occurs twice in a row."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.workload.bits import words_of_streams

# Below this bound, products of steps and factors are taken in int32, whose remainders cost a third.
_INT32 = 1 << 31


class Grid(NamedTuple):
    """An expert's rows, the entries of each, and the number of places that they spread over."""

    rows: int
    entries: int
    places: int


class _Walk(NamedTuple):
    """Order in which a grid's rows visit its places, pass after pass; `sharing` consecutive experts continue one walk.

    A pass is a run of rows long enough to visit all places. turns int64 [sharing, rows] number the passes of rows;
    steps int32 or int64 [sharing, entries, rows] are the positions of entries within a pass.
    """

    sharing: int
    num_turns: int
    turns: Tensor
    steps: Tensor

    def of(self, experts: Tensor) -> tuple[Tensor, Tensor]:
        """Return the turns and steps of `experts` int64 [e], by their position in the sequence."""
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


class _Joint(NamedTuple):
    """Constants that turn the keys of several grids into factors and offsets: [g, 1, 1], and all units concatenated."""

    walks: list[_Walk]
    num_turns: int
    sharing: Tensor
    units: Tensor
    num_units: Tensor
    first_unit: Tensor
    places: Tensor
    dtype: torch.dtype


@lru_cache(maxsize=32)
def _joint(grids: tuple[Grid, ...], device: torch.device) -> _Joint:
    walks = [_walk(grid, device) for grid in grids]
    units = [_units(grid.places, device) for grid in grids]
    counts = torch.tensor([one.numel() for one in units], device=device).view(-1, 1, 1)
    return _Joint(
        walks,
        max(walk.num_turns for walk in walks),
        torch.tensor([walk.sharing for walk in walks], device=device).unsqueeze(1),
        torch.cat(units),
        counts,
        counts.cumsum(0) - counts,
        torch.tensor([grid.places for grid in grids], device=device).view(-1, 1, 1),
        torch.int32 if all(grid.places**2 + grid.places * grid.entries < _INT32 for grid in grids) else torch.int64,
    )


def spread(seed: int, experts: Tensor, grids: Mapping[str, Grid]) -> list[Tensor]:
    """Return the place of each entry, int32 [e, entries, rows] by grid: distinct in a row, all used in every pass.

    In a pass, row * entries + entry goes through one keyed affine bijection of the places.
    """
    joint = _joint(tuple(grids.values()), experts.device)
    groups = experts.div(joint.sharing, rounding_mode="floor")
    words = words_of_streams(seed, [f"spread/{name}" for name in grids], groups, 2 * joint.num_turns)
    keys = words.long() & 0xFFFF_FFFF
    chosen = (keys[..., : joint.num_turns] % joint.num_units).add_(joint.first_unit)
    factors = joint.units.index_select(0, chosen.flatten()).view(chosen.shape).to(joint.dtype)
    offsets = (keys[..., joint.num_turns :] % joint.places).to(joint.dtype)
    each = zip(grids.values(), joint.walks, factors.unbind(0), offsets.unbind(0), strict=True)
    return [_places(experts, grid, walk, factor, offset) for grid, walk, factor, offset in each]


def _places(experts: Tensor, grid: Grid, walk: _Walk, factors: Tensor, offsets: Tensor) -> Tensor:
    """Return the places int32 [e, entries, rows] by factors and offsets [e, turns]."""
    turns, steps = walk.of(experts)
    if walk.num_turns == 1:
        factors, offsets = factors[:, :1], offsets[:, :1]
    else:
        factors, offsets = factors.gather(1, turns), offsets.gather(1, turns)
    places = steps.to(factors.dtype) * factors.unsqueeze(1)
    places += offsets.unsqueeze(1)
    return places.remainder_(grid.places).to(torch.int32)


@lru_cache(maxsize=32)
def _units(modulus: int, device: torch.device) -> Tensor:
    """Numbers coprime to `modulus`: multiplication by one of them permutes the residues."""
    return torch.tensor([unit for unit in range(1, modulus + 1) if math.gcd(unit, modulus) == 1], device=device)
