"""How sparse an exact layer has to be: entries of its rows, chosen so that every sum stays within what bf16 holds.

No tensor is made here, so a bad shape is refused before torch is loaded.
"""

from __future__ import annotations

import math
from typing import Literal, NoReturn

import msgspec

from distbench.architectures import LARGEST_FP8, Fp8Format
from distbench.errors import InvalidCase

# Columns of a block-scaled fp8 row that share one scale.
BLOCK = 128
# Whole numbers up to these survive bf16, and the cast to fp8 (e4m3) of a quantised combine.
MAX_UNITS = 256
MAX_FP8_UNITS = 16
GATE_STEP = 32.0
GUARD_GATE = 64.0
_GATE_RATIO = 2
_MIN_HIDDEN = 8
_MAX_GATE_COLUMNS = 64
_MAX_UP_ENTRIES = 4
_MAX_DOWN_ENTRIES = 8


class ExactPlan(msgspec.Struct, frozen=True, kw_only=True):
    """How many entries each row has: G gate columns, U entries of an up row, V of a w2 row.

    `weight_ratio` is the largest routing weight over the smallest, 2 or 1; the largest is 1. `guard_columns` and
    `guard_rows` say whether the last hidden column and the last intermediate row of each 128 are guards, which have
    the mantissa of `largest_fp8`, the largest number of the device's e4m3.
    """

    hidden_size: int
    intermediate_size: int
    topk: int
    num_experts: int
    gate_columns: int
    up_entries: int
    down_entries: int
    weight_ratio: int
    guard_columns: bool
    guard_rows: bool
    max_units: int
    largest_fp8: float

    @property
    def guard_column(self) -> float:
        """What a block's largest column has to be for its scale to be a power of two: 1.75 = 448 / 2**8, or 1.875."""
        return math.ldexp(math.frexp(self.largest_fp8)[0], 1)

    @property
    def guard_up(self) -> float:
        """7 or 7.5: with GUARD_GATE it makes 448 or 480 of a guard row, above all else in its block, 256 at most."""
        return 4 * self.guard_column

    @property
    def unit(self) -> float:
        """What all outputs are whole multiples of, `max_units` at most."""
        return GATE_STEP * self.down_step / self.weight_ratio

    @property
    def down_step(self) -> float:
        """Magnitude of w2's entries; with it the largest fp8 sum, 16 * 8, is below the largest number of any e4m3."""
        return 1.0 if self.max_units == MAX_UNITS else 0.25

    @property
    def up_columns(self) -> int:
        """Hidden columns that up rows may read: neither column 0, nor those of the gate, nor guards."""
        guards = self.hidden_size // BLOCK if self.guard_columns else 0
        return self.hidden_size - 1 - self.gate_columns - guards

    @property
    def entries(self) -> int:
        """Entries of one expert beside the gate's fixed ones."""
        return self.live_rows * (1 + self.up_entries) + self.hidden_size * self.down_entries

    @property
    def live_rows(self) -> int:
        """Intermediate rows that are no guards."""
        return self.intermediate_size - (self.intermediate_size // BLOCK if self.guard_rows else 0)


def plan_exact(  # noqa: PLR0913 - a case's keys
    hidden_size: int,
    intermediate_size: int,
    topk: int,
    dispatch_dtype: Literal["bf16", "fp8"],
    num_experts: int,
    combine_quant: str = "none",
    fp8_format: Fp8Format = "e4m3fn",
) -> ExactPlan:
    """Choose as many entries as the exactness bound allows: both weights first, then U up to 4, then V up to 8.

    With fp8 on the way back, sums stay within what fp8 holds, so that neither a cast nor a scaled block rounds any.

    Raises:
        InvalidCase: the shape cannot be exact, or cannot read all of its columns and rows; the message names the bound.

    """
    fp8 = dispatch_dtype == "fp8"
    if hidden_size < _MIN_HIDDEN:
        _refuse(f"hidden_size = {hidden_size}: at least {_MIN_HIDDEN} columns are needed for 1, the gate and the rest")
    if fp8 and hidden_size % BLOCK:
        _refuse(f"hidden_size = {hidden_size}: fp8 dispatch scales blocks of {BLOCK} columns, use a multiple of them")
    if combine_quant.startswith("fp4"):
        _refuse(f"combine_quant = {combine_quant}: its scales are sixths of each block's maximum, which rounds")
    max_units = MAX_UNITS if combine_quant == "none" else MAX_FP8_UNITS
    guard_rows = fp8 and intermediate_size % BLOCK == 0
    live_rows = intermediate_size - (intermediate_size // BLOCK if guard_rows else 0)
    plans = [
        ExactPlan(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            topk=topk,
            num_experts=num_experts,
            gate_columns=min(_MAX_GATE_COLUMNS, hidden_size // 4, live_rows),
            up_entries=up_entries,
            down_entries=min(_MAX_DOWN_ENTRIES, _entry_budget(max_units, topk, weight_ratio) // up_entries, live_rows),
            weight_ratio=weight_ratio,
            guard_columns=fp8,
            guard_rows=guard_rows,
            max_units=max_units,
            largest_fp8=LARGEST_FP8[fp8_format],
        )
        for weight_ratio in (2, 1)
        for up_entries in range(_MAX_UP_ENTRIES, 0, -1)
        if up_entries <= _entry_budget(max_units, topk, weight_ratio)
    ]
    if not plans:
        bound = max_units // _GATE_RATIO
        _refuse(f"topk = {topk}: the sum of a token's experts stays within {max_units} units up to topk = {bound}")
    return _first_covering(plans, num_experts)


def _entry_budget(max_units: int, topk: int, weight_ratio: int) -> int:
    return max_units // (topk * _GATE_RATIO * weight_ratio)


def _first_covering(plans: list[ExactPlan], num_experts: int) -> ExactPlan:
    hidden, inter = plans[0].hidden_size, plans[0].intermediate_size
    reading = [plan for plan in plans if hidden * plan.down_entries >= plan.live_rows]
    if not reading:
        most = max(hidden * plan.down_entries for plan in plans)
        _refuse(f"intermediate_size = {inter}: {hidden} w2 rows read {most} intermediate rows of {plans[0].live_rows}")
    covering = [plan for plan in reading if num_experts * plan.live_rows * plan.up_entries >= plan.up_columns]
    if not covering:
        most = max(num_experts * plan.live_rows * plan.up_entries for plan in reading)
        wanted = plans[0].up_columns
        _refuse(f"intermediate_size = {inter}: {num_experts} experts read {most} hidden columns of {wanted}")
    return covering[0]


def _refuse(reason: str) -> NoReturn:
    message = f"{reason}; change the shape or use numerics = gaussian"
    raise InvalidCase(message)
