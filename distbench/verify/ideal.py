"""Expert rows in float64, and as an ideal kernel of a family returns them: rounded only where its format demands it.

Only the rounding of stored values counts, so the ideal is computed in float64 up to each store. Its variance assumes
that each rounding error is uniform within its step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from distbench.experts.reference import grouped_routes, local_experts, local_rows, through_halves
from distbench.experts.roundings import Roundings
from distbench.layer import ExpertWeights
from distbench.workload.batch import TokenBatch
from distbench.workload.quantize import dequantize, fp8_dtype, through_blocks, through_weight_blocks

_EXPONENT = 0x7F80_0000
_BF16_STEP = 2.0**-7


class Ideal(NamedTuple):
    """Output of an ideal kernel: rows bf16 [n, H], and the variance of each element's error, float32 [n, H]."""

    rows: Tensor
    variance: Tensor


class _Routes(NamedTuple):
    """One family's routes bf16 [n * k + 1, H], and the error variance of intermediates by row, float32 [n + 1, H].

    The last element of each stands for no route.
    """

    rounded: Tensor
    middle: Tensor


def ideal_rows(
    batch: TokenBatch, weights: ExpertWeights, families: Sequence[Roundings]
) -> tuple[Tensor, tuple[Ideal, ...]]:
    """Return the local experts' weighted sums, float32 [n, H] from float64, and the ideal rows of each family.

    `batch` is the received batch, `weights` the weights of the rank's kernels. All families hold them in one format.
    Slots of experts elsewhere, or of no expert, add nothing.
    """
    count, topk = batch.ids.shape
    hidden = functional.pad(dequantize(batch.hidden, batch.scales).double(), (0, 0, 0, 1))
    shares = functional.pad(batch.weights.flatten().double(), (0, 1))
    exact = torch.zeros_like(hidden)
    made = [
        _Routes(
            hidden.new_zeros(count * topk + 1, hidden.shape[1], dtype=torch.bfloat16),
            torch.zeros_like(hidden, dtype=torch.float32),
        )
        for _ in families
    ]
    local = local_experts(batch.ids, local_rows(weights.mask)).flatten()
    for experts, routes, _ in grouped_routes(local, weights.w1.shape[0], weights.w1[0].numel() * 8):
        rows = routes.div(topk, rounding_mode="floor")
        w1, w2 = _held(weights, experts, families[0])
        share = shares[routes].unsqueeze(2)
        gate, up = torch.bmm(hidden[rows.flatten()].view(*rows.shape, -1), w1.double().transpose(1, 2)).chunk(2, dim=2)
        middle = functional.silu(gate) * up
        result = torch.bmm(middle, w2.double().transpose(1, 2))
        exact.index_add_(0, rows.flatten(), (result * share).flatten(0, 1))
        for family, one in zip(families, made, strict=True):
            off = (_stored(middle, family) - middle).float()
            off = torch.bmm(off, w2.float().transpose(1, 2))
            one.rounded[routes] = ((result + off) * share).bfloat16()
            one.middle.index_add_(0, rows.flatten(), (off * share.float()).flatten(0, 1))
    return exact[:-1].float(), tuple(
        _summed(one.rounded[:-1].view(count, topk, one.rounded.shape[1]), one.middle[:-1], family)
        for family, one in zip(families, made, strict=True)
    )


def rounding_variance(values: Tensor) -> Tensor:
    """Return the variance of an error that is uniform within a bf16 step at each of `values`, as float32."""
    steps = (values.float().view(torch.int32) & _EXPONENT).view(torch.float32) * _BF16_STEP
    return steps.square_().div_(12)


def _held(weights: ExpertWeights, experts: Tensor, family: Roundings) -> tuple[Tensor, Tensor]:
    """Return both weights of `experts` [g] as the kernel holds them, dequantised."""
    w1, w2 = weights.w1[experts], weights.w2[experts]
    if family.weights == "bf16":
        return w1, w2
    dtype = fp8_dtype(family.weights)
    return through_halves(w1, dtype), through_weight_blocks(w2, dtype)


def _stored(middle: Tensor, family: Roundings) -> Tensor:
    """Return the intermediate float64 [g, m, I] as it is stored."""
    stored = middle.bfloat16().float() if family.bf16_intermediate else middle.float()
    if family.intermediate:
        dtype = fp8_dtype(family.intermediate)
        return through_blocks(stored, dtype, power_of_two=family.scales == "power of two")
    return stored


def _summed(routes: Tensor, middle: Tensor, family: Roundings) -> Ideal:
    """Add up bf16 routes [n, k, H], whose intermediates' errors contributed `middle` [n, H]."""
    variance = rounding_variance(routes).sum(1)
    variance += middle.square().mean(1, keepdim=True)
    if family.sums == "float32":
        total = routes.float().sum(1)
        variance += rounding_variance(total)
        return Ideal(total.bfloat16(), variance)
    rows = torch.zeros_like(routes[:, 0])
    for slot, route in enumerate(routes.unbind(1)):
        first = rows.eq(0) if slot else None
        rows = rows + route
        if first is not None:  # adding zero, or adding to zero, does not round
            variance += rounding_variance(rows).masked_fill_(first | route.eq(0), 0.0)
    return Ideal(rows, variance)
