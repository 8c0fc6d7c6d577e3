"""Sparsity of an exact layer: entries per row, chosen so that every sum stays exact in bf16.

Makes no tensor, so a bad shape is refused before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Literal, NoReturn

import msgspec

from distbench.errors import InvalidCase
from distbench.utils.amd_arch import LARGEST_FP8, Fp8Format
from distbench.workload.formula import Formula
from distbench.workload.points import UP_ENTRIES, Points, certain_at_limit, halves_are_certain, points_for
from distbench.workload.probe_plan import ProbePlan, plan_code, plan_probes

Intermediate = Literal["bf16", "e4m3"]
"""Dtype that a kernel stores between its two products; one that keeps float32 gives the bits of bf16."""

# Columns of a block-scaled fp8 row that share one scale.
BLOCK = 128
# Integers up to these survive bf16, and the cast to fp8 (e4m3) of a quantised combine.
MAX_UNITS = 256
MAX_FP8_UNITS = 16
GUARD_GATE = 64.0
# Output weight of a guard row and, negated, of its twin: they cancel.
GUARD_STEP = 0.125
# Rows of each 128 that are guards, and the row that is always zero.
GUARD_ROWS = (63, 127)
ZERO_ROW = 95
KEPT_BYTES = 4 << 20
_MIN_HIDDEN = 4
_MAX_UP_ENTRIES = 4
_MAX_DOWN_ENTRIES = 8
_READS_OF_A_ROW = 4
_SHARES_OF_PROBES = (1.0, 0.5, 0.25, 0.125, 0.0)
# Integers of eight bits are exact in bf16 in any sum: the odd part of a guard times routes and weights.
_GUARD_PARTS = {448.0: 7, 240.0: 15}


class ExactPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Entries per row of sums, U of an up row and V of a w2 row, and the layout of probes.

    `weight_ratio` is the largest routing weight over the smallest, 2 or 1; the largest is 1. With `block_scaled`,
    hidden states travel as fp8. With `guard_rows`, each 128 intermediate rows hold two guards and a row of zeros;
    `guard_sums` output columns read guards. `largest_fp8` is the largest number of the device's e4m3. `combine` is the
    case's combine_quant.
    """

    hidden_size: int
    intermediate_size: int
    topk: int
    num_experts: int
    up_entries: int
    down_entries: int
    weight_ratio: int
    block_scaled: bool
    guard_rows: bool
    guard_sums: int
    max_units: int
    fp8_format: Fp8Format
    intermediate: Intermediate
    combine: str
    probes: ProbePlan | None
    formula: Formula = Formula()

    @property
    def largest_fp8(self) -> float:
        """The largest number of the device's e4m3."""
        return LARGEST_FP8[self.fp8_format]

    @property
    def guard_up(self) -> float:
        """7 or 7.5: with GUARD_GATE it gives a guard row 448 or 480, the maximum of its block."""
        return 7.0 if self.fp8_format == "e4m3fn" else 7.5

    @property
    def hot_up(self) -> float:
        """The up value that, with a gate of 64, gives the largest number of the device's e4m3."""
        return self.largest_fp8 / GUARD_GATE

    @property
    def gate_step(self) -> float:
        """The gate of sum rows, which is the value of the activation too, within a rounding to bf16.

        silu(32) and gelu(32) are 32 in float32. Within a limit, silu(8) and gelu(8) round to 8, in any product with a
        small whole number, and 4 * sigmoid(1.702 * 4) to 4. Where weights of 1/2 come first, 64 becomes 32.
        """
        if self.formula.activation == "swiglu":
            return 4.0
        if self.formula.limit:
            return 8.0
        return 64.0 if self.formula.weigh_first else 32.0

    @property
    def up_bound(self) -> int:
        """The largest magnitude of a sum row's up value, with what the activation adds to it."""
        return self.up_entries + (1 if self.formula.bias else self.formula.up_shift)

    @property
    def up_payload(self) -> int:
        """Number of entries in the up payload of a probe row; its bias takes the place of one."""
        return min(UP_ENTRIES - self.formula.bias, self.payload_columns)

    @property
    def weight_span(self) -> int:
        """The largest over the smallest factor by which routing weights change a sum: they enter gate and up alike."""
        return self.weight_ratio ** (2 if self.formula.weigh_first else 1)

    @property
    def unit(self) -> float:
        """Unit of all sums: each is an integer multiple of it, at most `max_units`."""
        return self.gate_step * self.down_step / self.weight_span

    @property
    def down_step(self) -> float:
        """Magnitude of w2's entries; it keeps the largest fp8 sum, 16 * 8, below the largest number of any e4m3."""
        return 1.0 if self.max_units == MAX_UNITS else 0.25

    @property
    def points(self) -> Points:
        """The numbers that the probes use."""
        return points_for(coarse=self.coarse, fp8=self.fp8_format if self.block_scaled else None, formula=self.formula)

    @property
    def weighs_unevenly(self) -> bool:
        """Whether routing weights may differ: always, unless they come first and no points are certain by halves."""
        fp8 = self.fp8_format if self.block_scaled else None
        return not self.formula.weigh_first or halves_are_certain(self.formula, coarse=self.coarse, fp8=fp8)

    @property
    def coarse(self) -> bool:
        """Whether values of probes are rounded to e4m3."""
        return self.intermediate == "e4m3" or self.combine != "none"

    @property
    def dead_columns(self) -> int:
        """Hidden columns at the end of each 128 that no sum or payload reads: a wide one, and with fp8 a zero."""
        return 2 if self.block_scaled else 1

    @property
    def wide_columns(self) -> int:
        """Number of wide columns: the last of each 128, and the last of all."""
        return -(-self.hidden_size // BLOCK)

    @property
    def live_columns(self) -> int:
        """Number of hidden columns that are neither wide nor zero."""
        rest = self.hidden_size % BLOCK
        return self.hidden_size // BLOCK * (BLOCK - self.dead_columns) + max(rest - 1, 0)

    @property
    def code_columns(self) -> int:
        """Number of code columns, the last of the live columns; a token has 1 in one of them."""
        return self.probes.code.columns if self.probes else 0

    @property
    def payload_columns(self) -> int:
        """Number of live columns that are not code columns; the first is always 1."""
        return self.live_columns - self.code_columns

    @property
    def gate_entries(self) -> tuple[int, int]:
        """Entries of 2 and of 1 in the payload of a gate row."""
        doubled = min(self.points.doubled, self.payload_columns)
        return doubled, min(self.points.single, self.payload_columns - doubled)

    @property
    def live_rows(self) -> int:
        """Number of intermediate rows that are neither guards nor zero."""
        return self.intermediate_size - (self.intermediate_size // BLOCK * 3 if self.guard_rows else 0)

    @property
    def sum_rows(self) -> int:
        """Number of live intermediate rows that are not probes."""
        return self.live_rows - (self.probes.rows if self.probes else 0)

    @property
    def sum_columns(self) -> int:
        """Number of output columns that neither are probes nor read guards."""
        return self.hidden_size - self.guard_sums - (self.probes.columns if self.probes else 0)

    @property
    def entry_bytes(self) -> int:
        """Bytes of one expert's entries, as int32."""
        rows = self.probes.rows * sum(self.gate_entries) if self.probes else 0
        return (rows + self.sum_rows * self.up_entries + self.sum_columns * self.down_entries) * 4

    @property
    def is_small(self) -> bool:
        """Whether the entries of all experts, and the weights of a rank, are small enough to be kept on a CPU."""
        return self.num_experts * self.entry_bytes <= KEPT_BYTES


@lru_cache(maxsize=64)
def plan_exact(  # noqa: PLR0913 - a case's keys
    hidden_size: int,
    intermediate_size: int,
    topk: int,
    dispatch_dtype: Literal["bf16", "fp8"],
    num_experts: int,
    combine_quant: str = "none",
    fp8_format: Fp8Format = "e4m3fn",
    intermediate: Intermediate = "bf16",
    formula: Formula = Formula(),  # noqa: B008 - frozen
) -> ExactPlan:
    """Choose the largest plan within the bounds: both weights first, then probes, then U up to 4, then V.

    With fp8 on the trip back, sums stay within the exact range of fp8, so neither a cast nor a scaled block rounds any.

    Raises:
        InvalidCase: the shape cannot be exact, or cannot read all of its columns and rows; the message names the bound.
    """
    fp8 = dispatch_dtype == "fp8"
    if hidden_size < _MIN_HIDDEN:
        _refuse(f"hidden_size = {hidden_size}: at least {_MIN_HIDDEN} columns are needed")
    if fp8 and hidden_size % BLOCK:
        _refuse(f"hidden_size = {hidden_size}: fp8 dispatch scales blocks of {BLOCK} columns, use a multiple of them")
    if combine_quant.startswith("fp4"):
        _refuse(f"combine_quant = {combine_quant}: its scales are sixths of each block's maximum, which rounds")
    _check_formula(formula, quantised=fp8 or combine_quant != "none")
    plain = ExactPlan(
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        topk=topk,
        num_experts=num_experts,
        up_entries=1,
        down_entries=1,
        weight_ratio=1,
        block_scaled=fp8,
        guard_rows=fp8 and intermediate_size % BLOCK == 0,
        guard_sums=0,
        max_units=MAX_UNITS if combine_quant == "none" else MAX_FP8_UNITS,
        fp8_format=fp8_format,
        intermediate=intermediate,
        combine=combine_quant,
        probes=None,
        formula=formula,
    )
    least = plain.up_bound + formula.bias
    if _budget(plain) < least:
        bound, most = plain.max_units, plain.max_units // least
        _refuse(f"topk = {topk}: the sum of a token's experts stays within {bound} units up to topk = {most}")
    return _first_covering(plain)


def _check_formula(formula: Formula, *, quantised: bool) -> None:
    """Refuse a limit whose products are not certain to round alike in all right kernels."""
    limit, swiglu = formula.limit, formula.activation == "swiglu"
    if not limit:
        return
    named = f"activation = {formula.activation}" if swiglu else f"swiglu_limit = {limit:g}"
    if quantised:
        _refuse(f"{named}: with fp8 the clamped values set scales that are no powers of two")
    least = 7 if swiglu else 8
    if limit < least:
        _refuse(f"swiglu_limit = {limit:g}: exact values need at least {least}")
    if not certain_at_limit(formula):
        _refuse(f"swiglu_limit = {limit:g}: products with it lie too close to a rounding boundary")


def _budget(plan: ExactPlan) -> int:
    """Return the units that one expert may add to a sum."""
    return plan.max_units // (plan.topk * plan.weight_span)


def _plans(plain: ExactPlan) -> Iterator[ExactPlan]:
    """Yield plans within the bounds, the best first."""
    for weight_ratio in (2, 1) if plain.weighs_unevenly else (1,):
        for share in _SHARES_OF_PROBES:
            sums = _with_probes(msgspec.structs.replace(plain, weight_ratio=weight_ratio), share)
            for up_entries in range(min(_MAX_UP_ENTRIES, sums.payload_columns), 0, -1):
                bound = msgspec.structs.replace(sums, up_entries=up_entries).up_bound
                down = min((_budget(sums) - sums.formula.bias) // bound, _MAX_DOWN_ENTRIES, sums.sum_rows)
                wanted = max(-(-_READS_OF_A_ROW * sums.sum_rows // max(sums.sum_columns, 1)), 2)
                if down > 0:
                    yield msgspec.structs.replace(sums, up_entries=up_entries, down_entries=min(down, wanted))


def _with_probes(plan: ExactPlan, share: float) -> ExactPlan:
    """Return the plan with `share` of the probes that fit, and with sums of guards."""
    probes = plan_probes(
        plan_code(plan.num_experts, plan.topk, plan.hidden_size),
        rows=_places(plan.intermediate_size),
        columns=_places(plan.hidden_size),
        wide_columns=plan.wide_columns,
        hot=plan.combine == "fp8_blockwise",
        share=share,
    )
    plan = msgspec.structs.replace(plan, probes=probes)
    blocks = plan.intermediate_size // BLOCK if plan.guard_rows else 0
    fits = _GUARD_PARTS[plan.largest_fp8] * plan.weight_span * plan.topk <= MAX_UNITS
    return msgspec.structs.replace(plan, guard_sums=min(blocks, plan.sum_columns // 4) if fits else 0)


def _places(size: int) -> int:
    """Return the number of places below `size` that are 1 or 2 mod 4: probes, so that tiles begin and end with sums."""
    return size // 4 * 2 + max(min(size % 4 - 1, 2), 0)


def _first_covering(plain: ExactPlan) -> ExactPlan:
    """Return the first plan whose sums read all intermediate rows, and whose experts together read all columns."""
    hidden, inter, experts = plain.hidden_size, plain.intermediate_size, plain.num_experts
    most_rows = most_columns = wanted = 0
    for plan in _plans(plain):
        if plan.sum_columns * plan.down_entries < plan.sum_rows:
            most_rows = max(most_rows, plan.sum_columns * plan.down_entries)
            continue
        reads = experts * max(up_reads(plan), gate_reads(plan))
        if reads >= plan.payload_columns:
            return plan
        most_columns, wanted = max(most_columns, reads), wanted or plan.payload_columns
    if not wanted:
        _refuse(
            f"intermediate_size = {inter}: {hidden} w2 rows read {most_rows} intermediate rows of {plain.live_rows}"
        )
    return _refuse(f"intermediate_size = {inter}: {experts} experts read {most_columns} hidden columns of {wanted}")


def up_reads(plan: ExactPlan) -> int:
    """Return the number of entries in the up rows of one expert's sums."""
    return plan.sum_rows * plan.up_entries


def gate_reads(plan: ExactPlan) -> int:
    """Return the number of payload entries in one expert's gates."""
    return plan.probes.gate_rows * sum(plan.gate_entries) if plan.probes else 0


def _refuse(reason: str) -> NoReturn:
    message = f"{reason}; change the shape or use numerics = gaussian"
    raise InvalidCase(message)
