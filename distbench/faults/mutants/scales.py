"""Mutants of the scales of fp8 blocks."""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.experts.base import ExpertInput
from distbench.experts.roundings import Scales
from distbench.faults.mutants.corpus import Class, Site, rare
from distbench.transport.base import Dispatched
from distbench.workload.batch import TokenBatch
from distbench.workload.exact_plan import BLOCK
from distbench.workload.quantize import power_of_two_scales

SCALES = Class("scales", "fp8")
_scale = SCALES.at


@_scale("widen")
def scales_ignored(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """All scales are read as 1."""
    return hidden.float()


@_scale("widen")
def scales_of_row_0(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """All rows have the scales of the first."""
    return site.right(hidden, scales[:1].expand_as(scales))


@_scale("widen")
def scales_of_the_row_before(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """Each row has the scales of the row before it."""
    return site.right(hidden, scales.roll(1, 0))


@_scale("widen")
def scales_reversed(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """Each row's scales are read from the last block to the first."""
    return site.right(hidden, scales.flip(1))


@_scale("widen")
def scale_of_block_0(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """All blocks of a row have the scale of the first."""
    return site.right(hidden, scales[:, :1].expand_as(scales))


@_scale("widen")
def scales_constant(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """All scales are read as 2^-8."""
    return site.right(hidden, torch.full_like(scales, 2.0**-8))


@_scale("widen")
def scales_transposed(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """Scales stored by row are read by block."""
    return site.right(hidden, scales.t().reshape(scales.shape))


@_scale("widen")
def scales_of_the_next_block(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """Each block has the scale of the next."""
    return site.right(hidden, scales.roll(-1, 1))


@_scale("widen")
def last_scale_is_its_neighbours(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """The last block has the scale of the one before it."""
    scales = scales.clone()
    scales[:, -1] = scales[:, -2]
    return site.right(hidden, scales)


@_scale("widen")
def half_of_a_block_has_the_next_scale(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """The second half of each block has the scale of the next: blocks begin 64 columns early."""
    made: Tensor = site.right(hidden, scales).unflatten(1, (-1, 2, 64))
    made[:, :, 1] = site.right(hidden, scales.roll(-1, 1)).unflatten(1, (-1, 2, 64))[:, :, 1]
    return made.flatten(1)


@_scale("widen")
def scales_applied_twice(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """Rows are multiplied by their scales twice."""
    return site.right(hidden, scales * scales)


@_scale("widen")
def scales_inverted(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """Rows are divided by their scales."""
    return site.right(hidden, 1 / scales)


@_scale("widen")
def scales_rounded_to_powers_of_two(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """Scales are read as e8m0: the next power of two."""
    return site.right(hidden, scales.log2().ceil().exp2())


@_scale(
    "widen",
    unseen="exact inputs have scales that are powers of two, which bf16 holds; gaussian values move by 2^-9 of "
    "themselves, a sixteenth of half a step of e4m3, by which quantising has moved them already",
)
def scales_rounded_to_bf16(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """Scales are rounded to bf16."""
    return site.right(hidden, scales.bfloat16().float())


@_scale("received")
def scales_delivered_to_the_next_row(site: Site, dispatched: Dispatched) -> Dispatched:
    """The transport delivers each row with the scales of the row before it."""
    if dispatched.scales is not None:
        count = int(dispatched.total_recv)
        dispatched.scales[:count] = dispatched.scales[:count].roll(1, 0)
    return dispatched


@_scale("sent")
def scales_sent_of_the_next_token(site: Site, batch: TokenBatch) -> TokenBatch:
    """A rank sends each token with the scales of the next one."""
    return batch if batch.scales is None else batch._replace(scales=batch.scales.roll(-1, 0))


@_scale("cut")
def scales_cut_from_row_1(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """The cut takes scales from row 1 on, the other fields from row 0."""
    return given if given.scales is None else given._replace(scales=given.scales.roll(-1, 0))


@_scale("widen", touches="row")
def scales_of_one_row_are_its_neighbours(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """One row in 64 has the scales of the row before it."""
    scales, wrong = scales.clone(), rare(len(scales))
    scales[wrong] = scales[(wrong - 1).clamp(min=0)]
    return site.right(hidden, scales)


@_scale("widen", touches="row")
def one_scale_doubled(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """The second scale of one row in 64 is doubled."""
    scales = scales.clone()
    scales[rare(len(scales)), 1] *= 2
    return site.right(hidden, scales)


@_scale("received", touches="row")
def scales_of_one_row_delivered_stale(site: Site, dispatched: Dispatched) -> Dispatched:
    """The transport delivers one row in 64 with the scales of the row before it."""
    if dispatched.scales is not None:
        wrong = rare(int(dispatched.total_recv))
        dispatched.scales[wrong] = dispatched.scales[(wrong - 1).clamp(min=0)]
    return dispatched


@_scale("widen", touches="elements")
def first_column_of_a_block_has_the_last_scale(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """The first column of each block has the scale of the block before it."""
    made = site.right(hidden, scales)
    made[:, 128::128] = site.right(hidden, scales.roll(1, 1))[:, 128::128]
    return made


@_scale("widen", touches="elements")
def guard_columns_unscaled(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """The last column of each block has the scale of the next block."""
    made = site.right(hidden, scales)
    made[:, 127::128] = site.right(hidden, scales.roll(-1, 1))[:, 127::128]
    return made


def _by_row_and_block(values: Tensor, dtype: torch.dtype, scales: Scales) -> Tensor:
    """Return the scales of an intermediate [g, m, I] in the form of `requantise`: [g, m, I/128]."""
    amax = values.unflatten(2, (-1, BLOCK)).abs().amax(3)
    if scales == "power of two":
        return power_of_two_scales(amax, dtype)
    return torch.where(amax == 0, 1.0, amax / torch.finfo(dtype).max)


def _rescaled(made: Tensor, own: Tensor, others: Tensor) -> Tensor:
    """Return a requantised intermediate that was multiplied by scales other than its own."""
    return made * (others / own).repeat_interleave(BLOCK, 2)


@_scale("requantise")
def intermediate_scales_of_the_row_before(
    site: Site, intermediate: Tensor, dtype: torch.dtype, scales: Scales
) -> Tensor:
    """Each row of the intermediate has the scales of the row before it."""
    own = _by_row_and_block(intermediate, dtype, scales)
    return _rescaled(site.right(intermediate, dtype, scales), own, own.roll(1, 1))


@_scale("requantise")
def intermediate_scales_reversed(site: Site, intermediate: Tensor, dtype: torch.dtype, scales: Scales) -> Tensor:
    """Scales of the intermediate are read from the last block to the first."""
    own = _by_row_and_block(intermediate, dtype, scales)
    return _rescaled(site.right(intermediate, dtype, scales), own, own.flip(2))


@_scale("requantise")
def intermediate_scales_ignored(site: Site, intermediate: Tensor, dtype: torch.dtype, scales: Scales) -> Tensor:
    """Scales of the intermediate are read as 1."""
    own = _by_row_and_block(intermediate, dtype, scales)
    return _rescaled(site.right(intermediate, dtype, scales), own, torch.ones_like(own))


@_scale("requantise", touches="row")
def intermediate_scales_of_one_row_doubled(
    site: Site, intermediate: Tensor, dtype: torch.dtype, scales: Scales
) -> Tensor:
    """The first scale of each expert's 38th row of the intermediate is doubled."""
    own = _by_row_and_block(intermediate, dtype, scales)
    wrong = own.clone()
    wrong[:, 37:38, 0] *= 2
    return _rescaled(site.right(intermediate, dtype, scales), own, wrong)


@_scale("requantise", touches="elements")
def last_column_of_the_intermediate_unscaled(
    site: Site, intermediate: Tensor, dtype: torch.dtype, scales: Scales
) -> Tensor:
    """The last column of the intermediate's first block has the scale of the next."""
    own = _by_row_and_block(intermediate, dtype, scales)
    made = site.right(intermediate, dtype, scales)
    made[..., BLOCK - 1] *= own[..., 1] / own[..., 0]
    return made


@_scale("widen", equivalent="a product of 4 and 24 significant bits is exact in float64, so it is rounded once too")
def scales_applied_in_float64(site: Site, hidden: Tensor, scales: Tensor) -> Tensor:
    """Rows are multiplied by their scales in float64, and rounded to float32."""
    wide: Tensor = hidden.double().unflatten(1, (scales.shape[1], -1)) * scales.double().unsqueeze(2)
    return wide.flatten(1).float()
