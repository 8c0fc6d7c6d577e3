"""Inputs for which every sum of the layer is exact in any order, so that every correct kernel gives the same bits.

hidden: column 0 is 1, columns 1..G are 0 or 1, the others -1, 0 or 1. Each gate row holds 32 at column 0 and 32 at one
of the columns 1..G, so the gate is 32 or 64, and silu(gate) is the gate itself in float32 (e**-32 is below half an ulp
of 1). Each up row holds U entries of +-1, each w2 row V of them; routing weights are 1 or 1/2. All partial sums of an
output element are then integers of at most k*V*U*2*2 units of 32 * 1/2, which bf16 holds exactly up to 256.

fp8 combine: w2 holds 1/4 in place of 1 and the sums are within 16 units, none of which e4m3 rounds.

fp8 dispatch: the last column of each 128 is 1.75 (1.875 where the device's fp8 ends at 240), which no weight reads, so
its block's scale is 2**-8 (2**-7) and quantising loses nothing. The last intermediate row of each 128 is likewise 448
(480) whatever the token, and no w2 row reads it, so a kernel that quantises its intermediate by blocks of 128 loses
nothing either.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.workload.bits import byte_columns, words_of_streams
from distbench.workload.plan import BLOCK, GATE_STEP, GUARD_GATE, ExactPlan
from distbench.workload.steps import rows_at_a_time

_CHUNK_ELEMENTS = 4 << 20
_KEPT_BYTES = 4 << 20


class Patterns(NamedTuple):
    """Which entries the rows of e experts have, as whole numbers; live intermediate rows are numbered without guards.

    first int32 [e, 1 + U, live]: the gate's column in 1..G, then those of up, plus H where the sign is minus.
    down int32 [e, V, H]: a live row, plus their number where the sign is minus.
    """

    first: Tensor
    down: Tensor


def expert_patterns(plan: ExactPlan, seed: int, experts: Tensor) -> Patterns:
    """Return the entries of `experts`, global ids int64 [e], any of them more than once, on the result's device.

    Entries of a row are distinct. An expert (or where it has too few rows, some experts in a sequence together) reads
    all columns, and all live rows. Those of a small layer are made once for all its experts.
    """
    if plan.num_experts * plan.entries * 4 <= _KEPT_BYTES:
        return Patterns(*(part.index_select(0, experts) for part in _all_patterns(plan, seed, experts.device)))
    used, position = torch.unique(experts, return_inverse=True)
    return Patterns(*(part.index_select(0, position) for part in _make_patterns(plan, seed, used)))


@lru_cache(maxsize=1)
def _all_patterns(plan: ExactPlan, seed: int, device: torch.device) -> Patterns:
    return _make_patterns(plan, seed, torch.arange(plan.num_experts, device=device))


def _make_patterns(plan: ExactPlan, seed: int, experts: Tensor) -> Patterns:
    live, hidden = plan.live_rows, plan.hidden_size
    gate, up, down = _spread(
        seed,
        experts,
        {
            "gate": _Grid(live, 1, plan.gate_columns),
            "up": _Grid(live, plan.up_entries, plan.up_columns),
            "down": _Grid(hidden, plan.down_entries, live),
        },
    )
    gate += 1
    up = _skip_guards(up.add_(1 + plan.gate_columns), skip=plan.guard_columns)
    bits = byte_columns(seed, "minus", experts, live + hidden, experts.device).to(torch.int32).unsqueeze(1)
    up += _bit_of_entry(bits[:, :, :live], plan.up_entries) * hidden
    down += _bit_of_entry(bits[:, :, live:], plan.down_entries) * live
    return Patterns(torch.cat([gate, up], dim=1), down)


def dense_weights(plan: ExactPlan, seed: int, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return w1 bf16 [e, 2I, H], gate rows before up rows, and w2 bf16 [e, H, I] of `experts` int64 [e]."""
    count, hidden, inter = experts.numel(), plan.hidden_size, plan.intermediate_size
    patterns = expert_patterns(plan, seed, experts)
    live = torch.arange(plan.live_rows, device=experts.device)
    rows = _skip_guards(live, skip=plan.guard_rows)
    w1 = torch.zeros(count, 2 * inter, hidden, dtype=torch.bfloat16, device=experts.device)
    w1[:, :inter, 0] = GATE_STEP
    if plan.guard_rows:
        w1[:, BLOCK - 1 : inter : BLOCK, 0] = GUARD_GATE
        w1[:, inter + BLOCK - 1 :: BLOCK, 0] = plan.guard_up
    gate, up = patterns.first[:, :1], patterns.first[:, 1:]
    _put(w1, rows, gate, torch.full_like(gate, int(GATE_STEP)))
    _put(w1, rows + inter, up % hidden, 1 - 2 * (up >= hidden).int())
    w2 = torch.zeros(count, hidden, inter, dtype=torch.bfloat16, device=experts.device)
    columns = _skip_guards(patterns.down % plan.live_rows, skip=plan.guard_rows)
    signs = 1 - 2 * (patterns.down >= plan.live_rows).int()
    _put(w2, torch.arange(hidden, device=experts.device), columns, signs * plan.down_step)
    return w1, w2


def hidden_states(plan: ExactPlan, seed: int, keys: Tensor) -> Tensor:
    """Return the rows of the tokens numbered `keys` int64 [n] (`token_keys`), bf16 [n, H] on their device."""
    hidden = torch.empty(keys.numel(), plan.hidden_size, dtype=torch.bfloat16, device=keys.device)
    step = rows_at_a_time(_CHUNK_ELEMENTS, plan.hidden_size, keys.device)
    for start in range(0, keys.numel(), step):
        part = keys[start : start + step]
        bits = byte_columns(seed, "hidden", part, plan.hidden_size, keys.device).to(torch.int16)
        hidden[start : start + step] = ((bits * 3) >> 8) - 1
        hidden[start : start + step, 1 : 1 + plan.gate_columns] = (bits[:, 1 : 1 + plan.gate_columns] & 1).bfloat16()
    hidden[:, 0] = 1.0
    if plan.guard_columns:
        hidden[:, BLOCK - 1 :: BLOCK] = plan.guard_column
    return hidden


def routing_weights(plan: ExactPlan, seed: int, keys: Tensor) -> Tensor:
    """Return the weights of the tokens numbered `keys` int64 [n]: float32 [n, k], powers of two of at most 1."""
    if plan.weight_ratio == 1:
        return torch.ones(keys.numel(), plan.topk, device=keys.device)
    bits = byte_columns(seed, "weights", keys, plan.topk, keys.device) & 1
    return 1.0 - 0.5 * bits


class _Grid(NamedTuple):
    """An expert's rows, the entries of each, and the places that they are spread over."""

    rows: int
    entries: int
    places: int


class _Walk(NamedTuple):
    """How a grid's rows go through its places, pass after pass; `sharing` experts in a sequence walk on together.

    A pass is a run of rows that is long enough for all places. turns int64 [sharing, rows] are the passes of rows,
    steps int64 [sharing, entries, rows] say where in them an entry comes.
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
def _walk(grid: _Grid, device: torch.device) -> _Walk:
    pass_rows = -(-grid.places // grid.entries)
    sharing = -(-pass_rows // grid.rows)
    rows = torch.arange(sharing * grid.rows, device=device).view(sharing, 1, grid.rows)
    turns = rows.div(pass_rows, rounding_mode="floor")
    steps = (rows - turns * pass_rows) * grid.entries + torch.arange(grid.entries, device=device).unsqueeze(1)
    return _Walk(sharing, -(-sharing * grid.rows // pass_rows), turns.squeeze(1), steps)


def _spread(seed: int, experts: Tensor, grids: Mapping[str, _Grid]) -> list[Tensor]:
    """Return the place of each entry, int32 [e, entries, rows] for each grid: distinct in a row, all in every pass.

    In a pass row * entries + entry goes through one keyed affine bijection of the places.
    """
    walks = [_walk(grid, experts.device) for grid in grids.values()]
    groups = torch.stack([experts.div(walk.sharing, rounding_mode="floor") for walk in walks])
    streams = [f"spread/{name}" for name in grids]
    words = words_of_streams(seed, streams, groups, 2 * max(walk.num_turns for walk in walks)).long() & 0xFFFF_FFFF
    each = zip(grids.values(), walks, words.unbind(0), strict=True)
    return [_places(experts, grid, walk, keys) for grid, walk, keys in each]


def _places(experts: Tensor, grid: _Grid, walk: _Walk, keys: Tensor) -> Tensor:
    """Return the places int32 [e, entries, rows] by keys int64 [e, 2 * num_turns or more], of 32 bits."""
    turns, steps = walk.of(experts)
    units = _units(grid.places, experts.device)
    factors = units[keys[:, : walk.num_turns] % units.numel()].gather(1, turns)
    offsets = (keys[:, walk.num_turns : 2 * walk.num_turns] % grid.places).gather(1, turns)
    places = steps * factors.unsqueeze(1)
    places += offsets.unsqueeze(1)
    return places.remainder_(grid.places).to(torch.int32)


@lru_cache(maxsize=32)
def _units(modulus: int, device: torch.device) -> Tensor:
    """Numbers that have no divisor in common with `modulus`: multiplying by one of them permutes the residues."""
    return torch.tensor([unit for unit in range(1, modulus + 1) if math.gcd(unit, modulus) == 1], device=device)


def _bit_of_entry(bits: Tensor, entries: int) -> Tensor:
    """Return bit j of each row's bits [e, 1, r] for entry j: [e, entries, r]."""
    entry = torch.arange(entries, dtype=bits.dtype, device=bits.device).view(-1, 1)
    return (bits >> entry) & 1


def _skip_guards(places: Tensor, *, skip: bool) -> Tensor:
    """Renumber places that were counted without the last of each 128."""
    return places + places.div(BLOCK - 1, rounding_mode="floor") if skip else places


def _put(weights: Tensor, rows: Tensor, columns: Tensor, values: Tensor) -> None:
    """Write values, as many as columns [e, entries, r], into weights [e, R, C] at rows [r]. No place comes twice.

    Flat, because `scatter_` walks all of `weights` on the CPU.
    """
    count, height, width = weights.shape
    first = torch.arange(count, device=weights.device).view(-1, 1, 1) * height
    index = (first + rows) * width + columns
    weights.view(-1).index_copy_(0, index.flatten(), values.flatten().to(weights.dtype))
