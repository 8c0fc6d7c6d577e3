"""Mutants of precision and of rounding."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from distbench.experts.base import ExpertInput
from distbench.experts.blocked_matmul import Weights
from distbench.experts.selection.choice import KernelChoice
from distbench.experts.steps import Group
from distbench.faults.mutants.corpus import Class, Site, live, rare
from distbench.workload.batch import TokenBatch
from distbench.workload.quantize import fp8_dtype, saturated

PRECISION = Class("precision")
ROUNDING = Class("rounding")
_precise, _round = PRECISION.at, ROUNDING.at

_MFMA_K = 16


def _accumulated(
    rows: Tensor, weights: Weights, group: Group, kept: Callable[[Tensor], Tensor], step: int = _MFMA_K
) -> Tensor:
    """Return rows times weights, with the accumulator rounded by `kept` after each `step` of K."""
    total = rows.new_zeros(rows.shape[0], rows.shape[1], weights.rows)
    for left, right in zip(rows.double().split(step, dim=2), weights.blocks(group.experts, step), strict=True):
        total = kept(total + torch.bmm(left, right).float())
    return total


def _in_bf16(values: Tensor) -> Tensor:
    return values.bfloat16().float()


def _in_fp16(values: Tensor) -> Tensor:
    return values.half().float()


def _in_14_bits(values: Tensor) -> Tensor:
    mantissa, exponent = torch.frexp(values)
    return torch.ldexp((mantissa * 2**14).round(), exponent - 14)


def _in_e4m3(values: Tensor) -> Tensor:
    return saturated(values, torch.float8_e4m3fn).float()


def _in_int8(values: Tensor) -> Tensor:
    """Return each row rounded to 127 steps of its largest magnitude."""
    step = values.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 127
    return (values / step).round() * step


def _towards_zero(values: Tensor) -> Tensor:
    """Return float32 values truncated to bf16: their low 16 bits are cleared."""
    return (values.float().view(torch.int32) & -0x10000).view(torch.float32)


@_precise("first")
def stage_1_accumulates_in_bf16(site: Site, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Stage 1 keeps its sums in bf16."""
    return _accumulated(rows, w1, group, _in_bf16)


@_precise("second")
def stage_2_accumulates_in_bf16(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Stage 2 keeps its sums in bf16."""
    return _accumulated(rows, w2, group, _in_bf16)


@_precise("first")
def stage_1_accumulates_in_fp16(site: Site, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Stage 1 keeps its sums in fp16."""
    return _accumulated(rows, w1, group, _in_fp16)


@_precise(
    "second",
    unseen="fp16 sums of 256 products are nearly as good as the route in bf16; with I 1024 the error is 1.08 of "
    "ideal where 1.06 is allowed, and is seen",
)
def stage_2_accumulates_in_fp16(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Stage 2 keeps its sums in fp16."""
    return _accumulated(rows, w2, group, _in_fp16)


@_precise("widen")
def hidden_in_e4m3(site: Site, hidden: Tensor, scales: Tensor | None) -> Tensor:
    """Hidden rows are rounded to e4m3 before stage 1, unscaled."""
    return _in_e4m3(site.right(hidden, scales))


@_precise("widen")
def hidden_in_int8(site: Site, hidden: Tensor, scales: Tensor | None) -> Tensor:
    """Hidden rows are rounded to int8 before stage 1, with a scale per token."""
    return _in_int8(site.right(hidden, scales))


@_precise("activate")
def activation_in_bf16(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """The activation is computed in bf16."""
    return (functional.silu(gate.bfloat16()) * up.bfloat16()).float()


@_precise("activate")
def sigmoid_in_bf16(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """The sigmoid is rounded to bf16."""
    return gate * torch.sigmoid(gate).bfloat16() * up


@_precise("activate")
def gate_and_up_in_bf16(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up are rounded to bf16 before the activation, which this kernel family does not do."""
    return site.right(_in_bf16(gate), _in_bf16(up))


@_precise("store")
def intermediate_in_e4m3(site: Site, intermediate: Tensor) -> Tensor:
    """The intermediate is stored in e4m3, unscaled, instead of bf16."""
    return _in_e4m3(intermediate)


@_precise("store")
def intermediate_in_int8(site: Site, intermediate: Tensor) -> Tensor:
    """The intermediate is stored in int8 with a scale per row."""
    return _in_int8(intermediate)


@_precise("round", bug="aiter AITER_FLYDSL_STAGE2_FP8: routes are rounded to fp8 before they are added")
def routes_in_e4m3(site: Site, routes: Tensor) -> Tensor:
    """The rows of routes are rounded to e4m3 before they are added."""
    return _in_e4m3(routes).bfloat16()


@_precise("returned")
def returned_rows_in_e4m3(site: Site, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows are rounded to e4m3 on the trip back, where combine was to use bf16."""
    return _in_e4m3(rows.float()).to(rows.dtype), ids


@_precise("first", touches="row")
def one_row_accumulates_in_bf16(site: Site, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Stage 1 keeps the sums of one row in 64 in bf16."""
    wrong = _accumulated(rows, w1, group, _in_bf16)
    return torch.where(site.rare_in(group), wrong, site.right(rows, w1, group, choice))


@_precise("widen", touches="row")
def one_row_in_e4m3(site: Site, hidden: Tensor, scales: Tensor | None) -> Tensor:
    """One row in 64 is rounded to e4m3 before stage 1."""
    made = site.right(hidden, scales)
    wrong = rare(len(made))
    made[wrong] = _in_e4m3(made[wrong])
    return made


@_precise("widen", touches="row")
def one_row_in_int8(site: Site, hidden: Tensor, scales: Tensor | None) -> Tensor:
    """One row in 64 is rounded to int8 before stage 1."""
    made = site.right(hidden, scales)
    wrong = rare(len(made))
    made[wrong] = _in_int8(made[wrong])
    return made


@_precise("store", touches="elements")
def two_intermediate_columns_in_e4m3(site: Site, intermediate: Tensor) -> Tensor:
    """The first two intermediate columns are rounded to e4m3."""
    made = site.right(intermediate)
    made[..., :2] = _in_e4m3(made[..., :2])
    return made


@_precise(
    "first",
    "fp8",
    unseen="a sum of 14 bits is off by 2^-15 of itself, a sixty-fourth of what bf16 drops of the intermediate; "
    "fp8 tensor cores of NVIDIA's Hopper keep about as many, so a correct kernel may do so",
)
def stage_1_accumulates_in_14_bits(site: Site, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Stage 1 keeps 14 bits of its sums."""
    return _accumulated(rows, w1, group, _in_14_bits)


@_precise("add", equivalent="a float64 sum of at most 8 bf16 rows, rounded once, is within 2^-22 of the float32 one")
def routes_added_in_float64(site: Site, routes: Tensor, sums: torch.dtype) -> Tensor:
    """Routes are added in float64 where the kernel adds in float32."""
    if sums is torch.bfloat16:
        return site.right(routes, sums)
    return routes.double().sum(1).float().bfloat16()


@_round("store")
def intermediate_truncated(site: Site, intermediate: Tensor) -> Tensor:
    """The intermediate is truncated to bf16."""
    return _towards_zero(intermediate)


@_round("round")
def routes_truncated(site: Site, routes: Tensor) -> Tensor:
    """The rows of routes are truncated to bf16."""
    return _towards_zero(routes).bfloat16()


@_round("add")
def adds_truncated(site: Site, routes: Tensor, sums: torch.dtype) -> Tensor:
    """The sum of the routes is truncated to bf16; after each add, where it is kept in bf16."""
    total = torch.zeros_like(routes[:, 0], dtype=torch.float32)
    for route in routes.unbind(1):
        total = total + route.float()
        total = _towards_zero(total) if sums is torch.bfloat16 else total
    return _towards_zero(total).bfloat16()


@_round("store")
def intermediate_rounded_up(site: Site, intermediate: Tensor) -> Tensor:
    """The intermediate is rounded towards plus infinity."""
    down = _towards_zero(intermediate)
    up = (down.view(torch.int32) + 0x10000).view(torch.float32)
    return torch.where(down < intermediate, torch.where(down < 0, down, up), down)


@_round("store")
def intermediate_rounded_at_random(site: Site, intermediate: Tensor) -> Tensor:
    """The intermediate is rounded stochastically: unbiased, and with twice the variance."""
    dither = torch.Generator().manual_seed(intermediate.shape[1])
    noise = torch.randint(0, 1 << 16, intermediate.shape, generator=dither, dtype=torch.int32)
    return _towards_zero((intermediate.contiguous().view(torch.int32) + noise).view(torch.float32))


@_round("store")
def low_bit_of_the_intermediate_cleared(site: Site, intermediate: Tensor) -> Tensor:
    """The lowest bit of the intermediate is always 0."""
    return (site.right(intermediate).contiguous().view(torch.int32) & -0x20000).view(torch.float32)


@_round("round")
def low_bit_of_routes_set(site: Site, routes: Tensor) -> Tensor:
    """The lowest bit of a route's row is always 1, except in zeros."""
    made = site.right(routes)
    return torch.where(made == 0, made, (made.contiguous().view(torch.int16) | 1).view(torch.bfloat16))


@_round("store")
def small_intermediates_flushed(site: Site, intermediate: Tensor) -> Tensor:
    """Intermediate values below 2^-6 are flushed to zero."""
    made = site.right(intermediate)
    return torch.where(made.abs() < 2.0**-6, 0.0, made)


@_round("computed")
def output_one_ulp_large(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """Every output is multiplied by 1 + 2^-7, which is an ulp or two of bf16."""
    rows[: live(given)] *= 1 + 2.0**-7
    return rows


@_round("sent", "fp8")
def dispatched_values_truncated(site: Site, batch: TokenBatch) -> TokenBatch:
    """Values sent in fp8 lose their lowest bit."""
    hidden = batch.hidden.clone()
    hidden.view(torch.uint8)[:] &= 0xFE
    return batch._replace(hidden=hidden)


@_round("sent", "fp8")
def dispatched_values_saturated_at_240(site: Site, batch: TokenBatch) -> TokenBatch:
    """Values are clamped to the largest number of e4m3fnuz where the device's is 448."""
    return batch._replace(hidden=saturated(batch.hidden.float().clamp(-240, 240), batch.hidden.dtype))


@_round("asked", "fp8")
def fp8_read_as_the_other_format(site: Site, given: ExpertInput) -> ExpertInput:
    """Bytes of e4m3fn are read as e4m3fnuz, which makes half of each value."""
    other = fp8_dtype("e4m3fnuz" if site.case.fp8_format == "e4m3fn" else "e4m3fn")
    wrong = given.hidden.clone()
    count = live(given)
    wrong[:count] = saturated(given.hidden[:count].view(other).float(), given.hidden.dtype)
    return given._replace(hidden=wrong)


@_round("returned", "cast")
def returned_rows_truncated_to_fp8(site: Site, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows are truncated, not rounded, when cast to fp8 on the trip back."""
    near = _in_e4m3(rows.float())
    step = (near.abs().log2().floor().clamp(min=-6) - 3).exp2()
    below = torch.where(near.abs() > rows.float().abs(), near.abs() - step, near.abs())
    return (below.clamp(min=0) * near.sign()).to(rows.dtype), ids


@_round("store", touches="row")
def first_row_of_an_expert_truncated(site: Site, intermediate: Tensor) -> Tensor:
    """The intermediate of each expert's 38th row is truncated."""
    made = site.right(intermediate)
    made[:, 37:38] = _towards_zero(intermediate[:, 37:38].contiguous())
    return made


@_round("store", touches="elements")
def two_intermediate_columns_truncated(site: Site, intermediate: Tensor) -> Tensor:
    """Intermediate columns 64 and 65 are truncated."""
    made = site.right(intermediate)
    made[..., 64:66] = _towards_zero(intermediate[..., 64:66].contiguous())
    return made


@_round("computed", touches="elements")
def low_bit_of_one_element_flipped(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """The lowest bit of column 99 is wrong in one row in 64."""
    rows.view(torch.int16)[rare(live(given)), 99] ^= 1
    return rows
