"""Layout of an exact layer: hidden columns, intermediate rows, output columns; the same for all experts."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.workload.exact_plan import BLOCK, GUARD_ROWS, ZERO_ROW, ExactPlan

_HOT_BLOCKS = 56


class Places(NamedTuple):
    """Places of a layer, int64.

    Hidden columns: codes [m], marks [m + 1], which are the codes and the first column, wide [Wc], zeros. Intermediate
    rows: sums [S], probes [R] by number, guards and twins [blocks], zero_rows [blocks]. Output columns: sums [.],
    guards [.], probes [C] by number. `hot_columns` are the numbers of the probe columns that a blockwise combine has
    one of in each block. `output` [H] maps each output column to its place among sums, probes by group, and one column
    of zeros.
    """

    codes: Tensor
    marks: Tensor
    wide: Tensor
    zeros: Tensor
    sum_rows: Tensor
    probe_rows: Tensor
    guards: Tensor
    twins: Tensor
    zero_rows: Tensor
    sum_columns: Tensor
    guard_columns: Tensor
    probe_columns: Tensor
    hot_columns: Tensor
    output: Tensor


@lru_cache(maxsize=8)
def places_of(plan: ExactPlan, device: torch.device) -> Places:
    """Return the places of a plan's layer on `device`."""
    hidden, inter = plan.hidden_size, plan.intermediate_size
    wide = [*range(BLOCK - 1, hidden, BLOCK), *([hidden - 1] if hidden % BLOCK else [])]
    blocks = range(0, inter if plan.guard_rows else 0, BLOCK)
    zero_rows = [start + ZERO_ROW for start in blocks]
    guards, twins = ([start + row for start in blocks] for row in GUARD_ROWS)
    rows = _probe_places(inter, plan.probes.rows, scattered=True) if plan.probes else []
    columns = _probe_places(hidden, plan.probes.columns, scattered=False) if plan.probes else []
    taken = {*rows, *guards, *twins, *zero_rows}
    others = [column for column in range(hidden) if column not in set(columns)]
    guard_columns = {others[number * len(others) // plan.guard_sums] for number in range(plan.guard_sums)}
    sums = [column for column in others if column not in guard_columns]
    source = dict.fromkeys(guard_columns, hidden - plan.guard_sums)
    source |= {column: number for number, column in enumerate(sums)}
    source |= {column: len(sums) + place for column, place in zip(columns, _by_group(plan), strict=True)}
    codes = [live_column(plan, number) for number in range(plan.payload_columns, plan.live_columns)]
    lists = (
        codes,
        [*codes, 0],
        wide,
        [column - 1 for column in wide] if plan.block_scaled else [],
        [row for row in range(inter) if row not in taken],
        rows,
        guards,
        twins,
        zero_rows,
        sums,
        sorted(guard_columns),
        columns,
        _hot(plan, columns),
        [source[column] for column in range(hidden)],
    )
    return Places(*(torch.tensor(one, dtype=torch.int64, device=device) for one in lists))


def live_column(plan: ExactPlan, number: int) -> int:
    """Return the hidden column of a live column's number; dead columns end each 128."""
    return number + number // (BLOCK - plan.dead_columns) * plan.dead_columns


def _probe_places(size: int, count: int, *, scattered: bool) -> list[int]:
    """Return `count` places that are 1 or 2 mod 4, evenly spread; with `scattered`, neighbours by number lie apart."""
    available = size // 4 * 2 + max(min(size % 4 - 1, 2), 0)
    stride = next(step for step in range(max(count * 5 // 8, 1), 2 * count + 2) if _coprime(step, count))
    spread = [(number * stride % count if scattered else number) * available // count for number in range(count)]
    return [4 * (place // 2) + 1 + place % 2 for place in spread]


def _coprime(left: int, right: int) -> bool:
    while right:
        left, right = right, left % right
    return left == 1


def _by_group(plan: ExactPlan) -> list[int]:
    """Return the place of each probe column in the order of groups."""
    if plan.probes is None:
        return []
    groups, slots = plan.probes.live_groups, plan.probes.column_slots
    return [number % groups * slots + number // groups for number in range(plan.probes.columns)]


def _hot(plan: ExactPlan, columns: list[int]) -> list[int]:
    """Return the number of the first probe column in each block that combine scales as one."""
    if plan.probes is None or not plan.probes.hot_rows:
        return []
    block = -(-plan.hidden_size // _HOT_BLOCKS)
    first: dict[int, int] = {}
    for number, column in enumerate(columns):
        first.setdefault(column // block, number)
    return list(first.values())
