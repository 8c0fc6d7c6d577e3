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

from distbench.experts.base import ExpertWeights
from distbench.experts.reference import WEIGHT_BYTES, grouped_routes, local_experts, local_rows, through_halves
from distbench.experts.roundings import Roundings
from distbench.experts.steps import Group
from distbench.workload.activation import activate
from distbench.workload.batch import TokenBatch
from distbench.workload.chunking import rows_at_a_time
from distbench.workload.formula import Formula
from distbench.workload.quantize import dequantize, fp8_dtype, through_blocks, through_weight_blocks

_EXPONENT = 0x7F80_0000
_BF16_STEP = 2.0**-7
_E4M3_STEP = 2.0**-3
# The step of a block's subnormals over its maximum, at most: a scale may leave half of e4m3's range, of either kind.
_E4M3_SUBNORMAL = 2.0**-9 / 224
_BLOCK = 128
_STEP = 2.0**-16  # of a central difference, relative
_SORTED_BYTES = 32 << 20
_WEIGHT_BYTES_ON_DEVICE = 1 << 30


class Ideal(NamedTuple):
    """Rows bf16 [n, H] of an ideal kernel, the variance of each element's error [n, H], and `order` [n, 2], float32.

    `order` is what the order of adds, one for all of a row's elements, may do to the variance of the whole row: what
    the reverse of the ideal's order does (column 0), and the most that any order adds (column 1).
    """

    rows: Tensor
    variance: Tensor
    order: Tensor


class _Routes(NamedTuple):
    """One family's routes bf16 [n * k + 1, H], and the variance that intermediates add to rows, float32 [n + 1, H].

    The last element of each stands for no route.
    """

    rounded: Tensor
    middle: Tensor


class _First(NamedTuple):
    """Gate and up of routes: their product float64 [g, m, 2I], and the weights [g, m, 1] and bias after it, if any."""

    product: Tensor
    share: Tensor | None
    bias: Tensor | None
    formula: Formula

    def activated(self, product: Tensor) -> Tensor:
        """Return the intermediate float64 [g, m, I] that follows `product`."""
        return activate(*self._gate_and_up(product), self.formula)

    def rounded(self, family: Roundings) -> Tensor:
        """Return the intermediate float64 [g, m, I] of a family, before it is stored."""
        product = self.product.bfloat16().double() if family.bf16_products else self.product
        if not family.bf16_activation:
            return self.activated(product)
        gate, up = self._gate_and_up(product)
        return activate(gate, torch.ones_like(up), self.formula).bfloat16().double() * up

    def variance(self, family: Roundings) -> Tensor:
        """Return the variance float32 [g, m, I] of a family's roundings before the intermediate is stored."""
        gate, up = self._gate_and_up(self.product)
        total = torch.zeros_like(gate, dtype=torch.float32)
        if family.bf16_products:
            total += self._of_products()
        if family.bf16_activation:
            activated = activate(gate, torch.ones_like(up), self.formula)
            total += rounding_variance(activated).mul_(up.float().square_())
        return total

    def _of_products(self) -> Tensor:
        """Return the variance float32 [g, m, I] that rounding the product to bf16 adds to the intermediate."""
        gate, up = self._gate_and_up(self.product)
        variance = rounding_variance(self.product)
        errors = (variance if self.share is None else variance * self.share.float().square()).chunk(2, dim=2)
        total = torch.zeros_like(errors[0])
        for place, error in enumerate(errors):
            step = (gate, up)[place].abs().add_(1).mul_(_STEP)
            sides = [(gate, up + side * step) if place else (gate + side * step, up) for side in (1, -1)]
            above, below = (activate(*side, self.formula) for side in sides)
            total += ((above - below) / (2 * step)).float().square_().mul_(error)
        return total

    def _gate_and_up(self, product: Tensor) -> tuple[Tensor, Tensor]:
        weighed = product if self.share is None else product * self.share
        gate, up = (weighed if self.bias is None else weighed + self.bias).chunk(2, dim=2)
        return gate, up


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
    exact, formula = torch.zeros_like(hidden), families[0].formula
    made = [
        _Routes(
            hidden.new_zeros(count * topk + 1, hidden.shape[1], dtype=torch.bfloat16),
            torch.zeros_like(hidden, dtype=torch.float32),
        )
        for _ in families
    ]
    local = local_experts(batch.ids, local_rows(weights.mask)).flatten()
    memory = WEIGHT_BYTES if hidden.device.type == "cpu" else _WEIGHT_BYTES_ON_DEVICE
    for group in grouped_routes(local, weights.w1.shape[0], weights.w1.shape[1:].numel() * 8, memory):
        experts, routes = group.experts, group.routes
        flat = routes.flatten()
        rows = flat.div(topk, rounding_mode="floor")
        w1, w2 = _held(weights, group, families[0])
        share = shares.index_select(0, flat).view(*routes.shape, 1)
        given = hidden.index_select(0, rows).view(*routes.shape, -1)
        product = torch.bmm(given, w1.double().transpose(1, 2))
        before, share = (share, torch.ones_like(share)) if formula.weigh_first else (None, share)
        bias = None if weights.bias1 is None else weights.bias1[experts].unsqueeze(1)
        first = _First(product, before, bias, formula)
        middle = first.activated(product)
        result = _with_bias(torch.bmm(middle, w2.double().transpose(1, 2)), weights.bias2, experts)
        exact.index_add_(0, rows, (result * share).flatten(0, 1))
        narrow = w2.float().transpose(1, 2)
        squares = narrow.square()
        for family, one in zip(families, made, strict=True):
            off = (_stored(first.rounded(family), family) - middle).float()
            one.rounded.index_copy_(0, flat, ((result + torch.bmm(off, narrow)) * share).bfloat16().flatten(0, 1))
            variance = _stored_variance(middle, family)
            if family.bf16_products or family.bf16_activation:
                variance += first.variance(family)
            variance.mul_(share.float().square_())
            one.middle.index_add_(0, rows, torch.bmm(variance, squares).flatten(0, 1))
    return exact[:-1].float(), tuple(
        summed(one.rounded[:-1].view(count, topk, one.rounded.shape[1]), one.middle[:-1], family)
        for family, one in zip(families, made, strict=True)
    )


def rounding_variance(values: Tensor) -> Tensor:
    """Return the variance of an error that is uniform within a bf16 step at each of `values`, as float32."""
    powers = (values.float().view(torch.int32) & _EXPONENT).view(torch.float32)
    return powers.square_().mul_(_BF16_STEP**2 / 12)


def _with_bias(rows: Tensor, bias: Tensor | None, experts: Tensor) -> Tensor:
    """Return rows [g, m, N] with the bias [El, N] of `experts` [g] added, if there is one."""
    return rows if bias is None else rows + bias[experts].unsqueeze(1)


def _held(weights: ExpertWeights, group: Group, family: Roundings) -> tuple[Tensor, Tensor]:
    """Return both weights of a group's experts as the kernel holds them, dequantised."""
    if group.run is None:
        w1, w2 = (part.index_select(0, group.experts) for part in (weights.w1, weights.w2))
    else:
        w1, w2 = weights.w1[group.run], weights.w2[group.run]
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


def _stored_variance(middle: Tensor, family: Roundings) -> Tensor:
    """Return the variance of what storing does to each intermediate value float64 [g, m, I]."""
    rounded = rounding_variance(middle)
    if not family.intermediate:
        return rounded if family.bf16_intermediate else torch.zeros_like(rounded)
    blocks = functional.pad(middle.float(), (0, -middle.shape[2] % _BLOCK)).unflatten(2, (-1, _BLOCK))
    least = blocks.abs().amax(3).mul_(_E4M3_SUBNORMAL).square_().div_(12).repeat_interleave(_BLOCK, 2)
    steps = (rounded * (_E4M3_STEP / _BF16_STEP) ** 2).maximum(least[:, :, : middle.shape[2]])
    return steps.add_(rounded) if family.bf16_intermediate else steps


def summed(routes: Tensor, middle: Tensor, family: Roundings) -> Ideal:
    """Add up bf16 routes [n, k, H], to which intermediate values add the variances `middle` [n, H]."""
    variance = rounding_variance(routes).sum(1)
    variance += middle
    if family.sums == "float32":
        total = routes.float().sum(1)
        variance += rounding_variance(total)
        return Ideal(total.bfloat16(), variance, variance.new_zeros(len(routes), 2))
    order = variance.new_zeros(len(routes), 2)
    several = (routes.ne(0).sum(2) > 0).sum(1).gt(1).nonzero().flatten()  # one route is added to zero: no rounding
    if len(several):
        some = routes.index_select(0, several)
        there, back = _rounded_adds(torch.cat([some, some.flip(1)])).chunk(2)
        most = _in_any_order(some)
        variance.index_add_(0, several, most)
        order.index_copy_(0, several, torch.stack([(back - there).sum(1), (most - there).sum(1)], dim=1))
    return Ideal(_added(routes)[-1], variance, order)


def _added(routes: Tensor) -> list[Tensor]:
    """Return the bf16 sums [n, H] after each of the routes bf16 [n, k, H], added in turn to +0.0."""
    sums = [routes[:, 0] + 0.0]
    for route in routes[:, 1:].unbind(1):
        sums.append(sums[-1] + route)
    return sums


def _rounded_adds(routes: Tensor) -> Tensor:
    """Return the variance, float32 [n, H], of the roundings when routes bf16 [n, k, H] are added in turn."""
    sums = torch.stack(_added(routes), dim=1)
    exact = sums[:, :-1].eq(0) | routes[:, 1:].eq(0)  # adding zero, or adding to zero, does not round
    return rounding_variance(sums[:, 1:]).masked_fill_(exact, 0.0).sum(1)


def _in_any_order(routes: Tensor) -> Tensor:
    """Return the most, float32 [n, H], that the variance of adding routes [n, k, H] one by one is in any order.

    The j-th add has a step no larger than the largest sum of j routes, or of the j least, has.
    """
    step = rows_at_a_time(_SORTED_BYTES, routes[:1].numel() * 32, routes.device)
    return torch.cat([_of_any_order(part) for part in routes.split(step)])


def _of_any_order(routes: Tensor) -> Tensor:
    ranked = routes.float().sort(1, descending=True).values
    largest = ranked.cumsum(1).abs().maximum(ranked.flip(1).cumsum(1).abs())
    adds = torch.arange(1, routes.shape[1] + 1, device=routes.device).view(1, -1, 1)
    needed = (adds > 1) & (adds <= routes.ne(0).sum(1, keepdim=True))
    return (rounding_variance(largest) * needed).sum(1)
