"""The probes of experts: payload of each probe row, probe row of each probe column, and the resulting values."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.workload.activation import activate
from distbench.workload.draws import Drawn, are_kept, bytes_of, probe_draws
from distbench.workload.exact_bias import probe_biases
from distbench.workload.exact_plan import ExactPlan
from distbench.workload.places import live_column, places_of
from distbench.workload.points import HOT_GATE, UP_ENTRIES, WIDE_POWERS
from distbench.workload.probe_plan import ProbePlan
from distbench.workload.quantize import fp8_dtype

# Number of bf16 bit patterns from 1 to 2**WIDE_POWERS, and the first of them.
WIDE_VALUES = WIDE_POWERS << 7
FIRST_WIDE = 0x3F80
_SWITCHES = 4
_HOT_READ = 0.125


class Probes(NamedTuple):
    """The probes of e experts, by number of row [R] and column [C]; see `ProbePlan`.

    entries int32 [e, n, R]: the hidden columns of a row's payload, plus H where the sign is minus, 2H for none; the
    first `doubled` ones count twice. wide int32 [e, R]: number of the wide column, Wc for none. switch float32 [e, R]:
    value of the row's switch when on. first int32 [e, R]: index in `row_values` of the value of payload 0. read int64
    [e, C]: slot within its group of the row that a column reads. weight float32 [e, C]: its output weight.
    """

    entries: Tensor
    wide: Tensor
    switch: Tensor
    first: Tensor
    read: Tensor
    weight: Tensor


class GroupedProbes(NamedTuple):
    """The `Probes` by group: [p] groups of experts, Q rows and D columns in each.

    entries int32 [p, n, Q], wide and first int32 [p, Q], read int64 and weight float32 [p, D]. A column's output is its
    weight times the row's value in `row_values`.
    """

    entries: Tensor
    wide: Tensor
    first: Tensor
    read: Tensor
    weight: Tensor


def probe_patterns(plan: ExactPlan, seed: int, experts: Tensor) -> Probes:
    """Return the probes of `experts`, ids int64 [e]; few for the device, they are made once for all experts."""
    if are_kept(plan, experts.device):
        return Probes(*(part.index_select(0, experts) for part in _all_probes(plan, seed, experts.device)))
    return _make_probes(plan, _probes(plan), seed, experts)


def grouped_probes(plan: ExactPlan, seed: int, experts: Tensor, groups: Tensor) -> GroupedProbes:
    """Return the probes of one group of each of `experts`, ids int64 [p], repeats allowed."""
    probes = _probes(plan)
    if are_kept(plan, experts.device):
        made, position = _all_grouped(plan, seed, experts.device), experts
    else:
        used, position = torch.unique(experts, return_inverse=True)
        made = _by_group(probes, _make_probes(plan, probes, seed, used))
    wanted = position * probes.live_groups + groups
    return GroupedProbes(*(part.index_select(0, wanted) for part in made))


@lru_cache(maxsize=1)
def _all_probes(plan: ExactPlan, seed: int, device: torch.device) -> Probes:
    return _make_probes(plan, _probes(plan), seed, torch.arange(plan.num_experts, device=device))


@lru_cache(maxsize=1)
def _all_grouped(plan: ExactPlan, seed: int, device: torch.device) -> GroupedProbes:
    return _by_group(_probes(plan), _all_probes(plan, seed, device))


def _probes(plan: ExactPlan) -> ProbePlan:
    assert plan.probes is not None  # noqa: S101 - called only for plans that have probes
    return plan.probes


def _by_group(probes: ProbePlan, made: Probes) -> GroupedProbes:
    count, entries, _ = made.entries.shape
    groups, rows, columns = probes.live_groups, probes.row_slots, probes.column_slots
    switch = made.switch.clone()
    switch[:, probes.first_up_row :] = 1.0  # a value already includes its gate
    number = made.read * groups + torch.arange(probes.columns, device=made.read.device) % groups
    weight = made.weight * switch.gather(1, number)

    def grouped(part: Tensor, slots: int) -> Tensor:
        return part.view(count, slots, groups).transpose(1, 2).reshape(count * groups, slots)

    return GroupedProbes(
        made.entries.view(count, entries, rows, groups).permute(0, 3, 1, 2).reshape(count * groups, entries, rows),
        grouped(made.wide, rows),
        grouped(made.first, rows),
        grouped(made.read, columns),
        grouped(weight, columns),
    )


def _make_probes(plan: ExactPlan, probes: ProbePlan, seed: int, experts: Tensor) -> Probes:
    doubled, single = plan.gate_entries
    drawn = probe_draws(plan, seed, experts)
    count = doubled + max(single, plan.up_payload)
    entries = drawn.places["read"].new_full((experts.numel(), count, probes.rows), 2 * plan.hidden_size)
    signs = drawn.words["signs"][:, : probes.rows].unsqueeze(1)
    for name, row, entry in (("gate", 0, 0), ("payload", probes.first_up_row, doubled)):
        places = drawn.places.get(name)
        if places is not None:
            _, number, rows = places.shape
            part = entries[:, entry : entry + number, row : row + rows]
            part.copy_(physical(plan, places))
            part += minus(signs[:, :, row : row + rows], number) * plan.hidden_size
    wide, switch, first, magnitude = _by_kind(plan, experts)
    if plan.formula.bias:
        first = first + probe_biases(plan, seed, experts)
    slots, weight = _reading(plan, probes, drawn, magnitude)
    return Probes(entries, wide, switch, first, slots, weight)


def physical(plan: ExactPlan, live: Tensor) -> Tensor:
    """Return the hidden columns of live columns' numbers."""
    if live_column(plan, plan.live_columns - 1) == plan.live_columns - 1:
        return live
    return _columns(plan, live.device).index_select(0, live.flatten()).view(live.shape)


@lru_cache(maxsize=4)
def _columns(plan: ExactPlan, device: torch.device) -> Tensor:
    columns = [live_column(plan, number) for number in range(plan.live_columns)]
    return torch.tensor(columns, dtype=torch.int32, device=device)


def minus(bits: Tensor, entries: int) -> Tensor:
    """Return bit j of each row's bits [e, 1, r] for entry j: [e, entries, r]."""
    return (bits >> _bit_numbers(entries, bits.dtype, bits.device)) & 1


@lru_cache(maxsize=16)
def _bit_numbers(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.arange(count, dtype=dtype, device=device).view(-1, 1)


def switches(plan: ExactPlan, experts: Tensor) -> Tensor:
    """Return `switch` of the `Probes` of `experts`, which no seed changes: float32 [e, R]."""
    return _make_by_kind(plan, experts)[1]


def _by_kind(plan: ExactPlan, experts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `wide`, `switch` and `first` of `Probes`, and the magnitude [e, R] of output weights reading each row."""
    if are_kept(plan, experts.device) and experts.numel() == plan.num_experts:
        return _all_by_kind(plan, experts.device)
    return _make_by_kind(plan, experts)


@lru_cache(maxsize=4)
def _all_by_kind(plan: ExactPlan, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _make_by_kind(plan, torch.arange(plan.num_experts, device=device))


def _make_by_kind(plan: ExactPlan, experts: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    static = _static_kinds(plan, experts.device)
    turns = experts.unsqueeze(1)
    cycle = (static.number + turns).remainder(static.cycle)
    place = static.start + cycle
    wide = static.wide_start + turns * static.wide_step
    wide = torch.where(static.wide_step > 0, wide.remainder(plan.wide_columns), plan.wide_columns)
    switch, first, magnitude = (table.index_select(0, place.flatten()).view(place.shape) for table in static.tables)
    return wide.to(torch.int32), switch, (first + static.shift).to(torch.int32), magnitude


class _Static(NamedTuple):
    """Properties of rows that all experts share, [R]; tables by place: switch, first value, magnitude.

    `shift` is added to the place of the first value: the values of wide columns that a row negates come apart.
    """

    number: Tensor
    cycle: Tensor
    start: Tensor
    wide_start: Tensor
    wide_step: Tensor
    shift: Tensor
    tables: tuple[Tensor, Tensor, Tensor]


@lru_cache(maxsize=8)
def _static_kinds(plan: ExactPlan, device: torch.device) -> _Static:
    """Return the kinds of a plan's rows; each cycles through its switches, from another start for each expert."""
    probes, points = _probes(plan), plan.points
    groups = probes.live_groups
    powers = [2.0**power for power in range(_SWITCHES)]
    only = 1 if plan.block_scaled and plan.fp8_format == "e4m3fn" else _SWITCHES - 1
    values = _offsets(plan)
    kinds = [
        (probes.gate_rows, [(power, values[0][0], 1.0) for power in powers], False),
        (probes.wide_gate_rows, [(2.0**only, values[1][0], 1.0)], True),
        (probes.up_rows, [(q, at, m) for (q, m), at in zip(points.up_gates, values[2], strict=True)], False),
        (probes.wide_up_rows, [(q, at, m) for (q, m), at in zip(points.wide_up_gates, values[3], strict=True)], True),
        (probes.hot_rows, [(HOT_GATE, values[4][0], 0.0)], False),
    ]
    number, cycle, start, wide_start, wide_step = [], [], [], [], []
    places: list[tuple[float, int, float]] = []
    for count, switches, reads_wide in kinds:
        number += [row + row // groups for row in range(count)]
        cycle += [len(switches)] * count
        start += [len(places)] * count
        wide_start += list(range(count))
        wide_step += [count if reads_wide else 0] * count
        places += switches
    lists = [
        torch.tensor(one, dtype=torch.int64, device=device) for one in (number, cycle, start, wide_start, wide_step)
    ]
    switch, first, magnitude = zip(*places, strict=True)
    tables = (
        torch.tensor(switch, device=device),
        torch.tensor(first, dtype=torch.int64, device=device),
        torch.tensor(magnitude, device=device),
    )
    shift = torch.zeros(probes.rows, dtype=torch.int64, device=device)
    wide_up = probes.first_up_row + probes.up_rows
    negative = wide_up_signs(plan, device) < 0
    shift[wide_up : wide_up + probes.wide_up_rows] = negative * len(points.wide_up_gates) * WIDE_VALUES
    return _Static(lists[0], lists[1], lists[2], lists[3], lists[4], shift, tables)


def wide_up_signs(plan: ExactPlan, device: torch.device) -> Tensor:
    """Return by what rows multiply the wide column in their up values, 1 or, in every second row within a limit, -1."""
    number = torch.arange(_probes(plan).wide_up_rows, device=device)
    return 1 - 2 * (number % 2) if plan.formula.limit else torch.ones_like(number)


def _reading(plan: ExactPlan, probes: ProbePlan, drawn: Drawn, magnitude: Tensor) -> tuple[Tensor, Tensor]:
    """Return `read` and `weight` of `Probes`: a bijection of columns in each group, rotated by the group."""
    device, groups, slots = magnitude.device, probes.live_groups, probes.row_slots
    read = drawn.places["read"].squeeze(1)
    group, column_slot = _groups_and_slots(probes.columns, groups, device)
    turned = (read.index_select(1, column_slot).long() + group).remainder_(probes.column_slots)
    hot = places_of(plan, device).hot_columns
    chosen = turned.remainder_(slots)
    chosen[:, hot] = slots - 1
    row = chosen * groups + group
    bits = bytes_of(drawn.words["weights"], probes.columns)
    gates = row < probes.first_up_row
    power = (bits & 1) + (plan.combine != "none")
    size = torch.where(gates, (1 << power).float(), magnitude.gather(1, row))
    if probes.hot_rows:
        size = torch.where(row >= probes.rows - probes.hot_rows, _HOT_READ, size)
        size[:, hot] = (2 << (bits[:, hot] & 1)).float()
    return chosen, size * (1.0 - (bits >> 7).float() * 2)


@lru_cache(maxsize=8)
def _groups_and_slots(columns: int, groups: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the group and the slot within it of each probe column, int64 [columns]."""
    number = torch.arange(columns, device=device)
    return number % groups, number.div(groups, rounding_mode="floor")


def routing_factors(plan: ExactPlan) -> tuple[float, ...]:
    """Return the factors of gates in `row_values`, in its order: the routing weights where they come first, else 1."""
    return (1.0, 0.5) if plan.formula.weigh_first and plan.weight_ratio > 1 else (1.0,)


def row_values(plan: ExactPlan, device: torch.device) -> Tensor:
    """Return all values of probe rows without their switch of 2**p, float32, rounded as the intermediate is stored.

    They are repeated for each of `routing_factors`, by which the gates are multiplied.
    """
    return _row_values(plan).to(device)


@lru_cache(maxsize=8)
def _row_values(plan: ExactPlan) -> Tensor:
    points = plan.points
    payload = torch.arange(-points.largest, points.largest + 1, dtype=torch.float64)
    ups = torch.arange(-UP_ENTRIES, UP_ENTRIES + 1, dtype=torch.float64)
    wide = (torch.arange(WIDE_VALUES, dtype=torch.int16) + FIRST_WIDE).view(torch.bfloat16).double()
    wide_ups = [wide, -wide] if plan.formula.limit else [wide]

    on = torch.tensor([1.0 - plan.formula.up_shift], dtype=torch.float64)
    parts = []
    for weight in routing_factors(plan):
        parts += [
            activate(payload * points.step * weight, on, plan.formula),
            activate(wide * points.wide_step * weight, on, plan.formula),
            *(activate(ups.new_tensor([gate * weight]), ups, plan.formula) for gate, _ in points.up_gates),
            *(
                activate(ups.new_tensor([gate * weight]), signed, plan.formula)
                for signed in wide_ups
                for gate, _ in points.wide_up_gates
            ),
            torch.tensor([plan.largest_fp8 * weight], dtype=torch.float64),
        ]
    values = torch.cat(parts).bfloat16().float()
    return values.to(fp8_dtype(plan.fp8_format)).float() if plan.intermediate == "e4m3" else values


def _offsets(plan: ExactPlan) -> list[list[int]]:
    """Return the index in `row_values` of payload 0, for each kind of row and each of its gates."""
    points = plan.points
    wide = 2 * points.largest + 1
    ups = wide + WIDE_VALUES
    wide_ups = ups + len(points.up_gates) * (2 * UP_ENTRIES + 1)
    hot = wide_ups + len(points.wide_up_gates) * WIDE_VALUES * (2 if plan.formula.limit else 1)
    return [
        [points.largest],
        [wide],
        [ups + place * (2 * UP_ENTRIES + 1) + UP_ENTRIES for place in range(len(points.up_gates))],
        [wide_ups + place * WIDE_VALUES for place in range(len(points.wide_up_gates))],
        [hot],
    ]
