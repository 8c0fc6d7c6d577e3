"""Mutants that omit, double or displace part of K or N in one of the two products."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from distbench.experts.blocked_matmul import Weights
from distbench.experts.selection.choice import KernelChoice
from distbench.experts.steps import Group
from distbench.faults.mutants.corpus import Class, Site

K_COVERAGE = Class("K coverage", "bf16", "fp8")
N_COVERAGE = Class("N coverage", "bf16")
_k, _n = K_COVERAGE.at, N_COVERAGE.at

_BLOCK = 128


def _reading(
    site: Site, operands: Sequence[Any], change: Callable[[Tensor], Tensor], *, gate: bool, up: bool
) -> Tensor:
    """Return stage 1 with gate, up or both computed from rows changed by `change`."""
    rows, *others = operands
    changed = rows.clone()
    change(changed)
    wrong = site.right(changed, *others)
    if not (gate and up):
        right = site.right(*operands)
        half = right.shape[2] // 2
        kept = slice(half, None) if gate else slice(half)
        wrong[..., kept] = right[..., kept]
    return wrong


def _second(site: Site, operands: Sequence[Any], change: Callable[[Tensor], Tensor]) -> Tensor:
    rows, *others = operands
    changed = rows.clone()
    change(changed)
    return site.right(changed, *others)


@_k("first")
def gate_reads_65_columns(site: Site, *operands: Any) -> Tensor:
    """The gate's product ends after 65 columns of K."""
    return _reading(site, operands, lambda rows: rows[..., 65:].zero_(), gate=True, up=False)


@_k("first")
def up_reads_65_columns(site: Site, *operands: Any) -> Tensor:
    """The product of up ends after 65 columns of K."""
    return _reading(site, operands, lambda rows: rows[..., 65:].zero_(), gate=False, up=True)


@_k("first")
def last_block_lost(site: Site, *operands: Any) -> Tensor:
    """Stage 1 omits the last 128 of K."""
    return _reading(site, operands, lambda rows: rows[..., -_BLOCK:].zero_(), gate=True, up=True)


@_k("first")
def gate_doubles_its_last_block(site: Site, *operands: Any) -> Tensor:
    """The gate adds the last 128 of K twice."""
    return _reading(site, operands, lambda rows: rows[..., -_BLOCK:].mul_(2), gate=True, up=False)


@_k("first")
def first_block_lost(site: Site, *operands: Any) -> Tensor:
    """Stage 1 begins at the second 128 of K."""
    return _reading(site, operands, lambda rows: rows[..., :_BLOCK].zero_(), gate=True, up=True)


@_k("first")
def block_1_read_for_block_2(site: Site, *operands: Any) -> Tensor:
    """The rows' second 128 of K meets the weights' third as well."""
    return _reading(
        site, operands, lambda rows: rows[..., 256:384].copy_(rows[..., 128:256].clone()), gate=True, up=True
    )


@_k("first")
def last_half_of_split_k_lost(site: Site, *operands: Any) -> Tensor:
    """Of two parts of K the second is not added."""
    return _reading(site, operands, lambda rows: rows[..., rows.shape[2] // 2 :].zero_(), gate=True, up=True)


@_k("first")
def first_half_of_split_k_twice(site: Site, *operands: Any) -> Tensor:
    """Of two parts of K the first is added twice."""
    return _reading(site, operands, lambda rows: rows[..., : rows.shape[2] // 2].mul_(2), gate=True, up=True)


@_k("first")
def odd_columns_of_the_last_block_lost(site: Site, *operands: Any) -> Tensor:
    """Stage 1 skips every second column of the last 128 of K."""
    return _reading(site, operands, lambda rows: rows[..., 1 - _BLOCK :: 2].zero_(), gate=True, up=True)


@_k("second")
def stage_2_loses_its_last_block(site: Site, *operands: Any) -> Tensor:
    """Stage 2 omits the last 128 of K."""
    return _second(site, operands, lambda rows: rows[..., -_BLOCK:].zero_())


@_k("second")
def stage_2_swaps_its_blocks(site: Site, *operands: Any) -> Tensor:
    """The intermediate's halves meet each other's weights."""
    return _second(site, operands, lambda rows: rows.copy_(rows.roll(rows.shape[2] // 2, 2)))


@_k("first", touches="elements")
def column_0_lost_in_the_gate(site: Site, *operands: Any) -> Tensor:
    """The gate does not read column 0 of K."""
    return _reading(site, operands, lambda rows: rows[..., 0].zero_(), gate=True, up=False)


@_k("first", touches="elements")
def column_77_lost_in_the_gate(site: Site, *operands: Any) -> Tensor:
    """The gate does not read column 77 of K."""
    return _reading(site, operands, lambda rows: rows[..., 77].zero_(), gate=True, up=False)


@_k("first", touches="elements")
def column_77_lost_in_up(site: Site, *operands: Any) -> Tensor:
    """Up does not read column 77 of K."""
    return _reading(site, operands, lambda rows: rows[..., 77].zero_(), gate=False, up=True)


@_k("first", touches="elements")
def last_column_lost(site: Site, *operands: Any) -> Tensor:
    """Stage 1 does not read the last column of K."""
    return _reading(site, operands, lambda rows: rows[..., -1].zero_(), gate=True, up=True)


@_k("first", touches="elements")
def last_vector_lost(site: Site, *operands: Any) -> Tensor:
    """Stage 1 does not read the last 4 columns of K."""
    return _reading(site, operands, lambda rows: rows[..., -4:].zero_(), gate=True, up=True)


@_k("first", touches="elements")
def column_254_read_for_255(site: Site, *operands: Any) -> Tensor:
    """Column 255 of K is read as column 254."""
    return _reading(site, operands, lambda rows: rows[..., 255].copy_(rows[..., 254]), gate=True, up=True)


@_k("first", touches="elements")
def guard_column_doubled_in_the_gate(site: Site, *operands: Any) -> Tensor:
    """The gate adds column 127, the last of the first scale block, twice."""
    return _reading(site, operands, lambda rows: rows[..., 127].mul_(2), gate=True, up=False)


@_k("second", touches="elements")
def stage_2_loses_its_last_column(site: Site, *operands: Any) -> Tensor:
    """Stage 2 does not read the last column of K."""
    return _second(site, operands, lambda rows: rows[..., -1].zero_())


@_k("second", touches="elements")
def stage_2_doubles_column_0(site: Site, *operands: Any) -> Tensor:
    """Stage 2 adds column 0 of K twice."""
    return _second(site, operands, lambda rows: rows[..., 0].mul_(2))


@_k("second", touches="elements")
def stage_2_loses_column_127(site: Site, *operands: Any) -> Tensor:
    """Stage 2 does not read column 127 of K."""
    return _second(site, operands, lambda rows: rows[..., 127].zero_())


@_k(
    "first",
    "bf16",
    equivalent="the same products are added in float32 in another order of blocks: 2^-24 a block, bf16 keeps 2^-8",
)
def k_blocks_in_reverse(site: Site, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Blocks of K are added from the last to the first."""
    blocks = list(
        zip(rows.double().split(choice.tile_k1, dim=2), w1.blocks(group.experts, choice.tile_k1), strict=True)
    )
    total = rows.new_zeros(rows.shape[0], rows.shape[1], w1.rows)
    for left, right in reversed(blocks):
        total += torch.bmm(left, right).float()
    return total


@_n("second")
def last_64_columns_lost(site: Site, *operands: Any) -> Tensor:
    """The last 64 output columns are zero."""
    made = site.right(*operands)
    made[..., -64:] = 0
    return made


@_n("second")
def first_tile_written_twice(site: Site, *operands: Any) -> Tensor:
    """Output columns 128 to 255 hold the values of 0 to 127."""
    made = site.right(*operands)
    made[..., 128:256] = made[..., :128].clone()
    return made


@_n("second")
def columns_rolled_by_one(site: Site, *operands: Any) -> Tensor:
    """Each output column is one place to the right."""
    made = site.right(*operands)
    return made.roll(1, 2)


@_n("second")
def halves_of_32_lanes_swapped(site: Site, *operands: Any) -> Tensor:
    """Of each 32 output columns the halves are exchanged."""
    halves: Tensor = site.right(*operands).unflatten(2, (-1, 2, 16))
    return halves.flip(3).flatten(2)


@_n("first")
def last_gate_tile_lost(site: Site, *operands: Any) -> Tensor:
    """The last 64 gate columns are zero."""
    made = site.right(*operands)
    made[..., made.shape[2] // 2 - 64 : made.shape[2] // 2] = 0
    return made


@_n("first")
def up_shifted_by_one(site: Site, *operands: Any) -> Tensor:
    """Up is one column off its gate."""
    made = site.right(*operands)
    half = made.shape[2] // 2
    made[..., half:] = made[..., half:].roll(1, 2)
    return made


@_n("first")
def gate_and_up_interleaved(site: Site, *operands: Any) -> Tensor:
    """Weights with gate rows before up rows are read as if they alternated."""
    made = site.right(*operands)
    return torch.cat([made[..., ::2], made[..., 1::2]], dim=2)


@_n("second", touches="elements")
def last_column_lost_in_the_output(site: Site, *operands: Any) -> Tensor:
    """The last output column is zero."""
    made = site.right(*operands)
    made[..., -1] = 0
    return made


@_n("second", touches="elements")
def column_0_lost_in_the_output(site: Site, *operands: Any) -> Tensor:
    """Output column 0 is zero."""
    made = site.right(*operands)
    made[..., 0] = 0
    return made


@_n("second", touches="elements", bug="aiter 3117, 3344: padding lanes of a stage-2 kernel are left uninitialised")
def last_lanes_hold_nan(site: Site, *operands: Any) -> Tensor:
    """The last 4 output columns are NaN."""
    made = site.right(*operands)
    made[..., -4:] = float("nan")
    return made


@_n("second", touches="elements")
def last_column_is_its_neighbour(site: Site, *operands: Any) -> Tensor:
    """The last output column repeats the one before it."""
    made = site.right(*operands)
    made[..., -1] = made[..., -2]
    return made


@_n("second", touches="elements")
def two_columns_swapped(site: Site, *operands: Any) -> Tensor:
    """Output columns 63 and 64 are exchanged."""
    made = site.right(*operands)
    made[..., 63:65] = made[..., 63:65].flip(2)
    return made


@_n("second", touches="elements")
def column_200_negated(site: Site, *operands: Any) -> Tensor:
    """Output column 200 has the wrong sign."""
    made = site.right(*operands)
    made[..., 200] *= -1
    return made


@_n("first", touches="elements")
def last_gate_column_lost(site: Site, *operands: Any) -> Tensor:
    """The last gate column is zero."""
    made = site.right(*operands)
    made[..., made.shape[2] // 2 - 1] = 0
    return made


@_n("first", touches="elements")
def gate_column_is_its_neighbour(site: Site, *operands: Any) -> Tensor:
    """Gate column 128, the first of a tile, is column 127."""
    made = site.right(*operands)
    made[..., 128] = made[..., 127]
    return made
