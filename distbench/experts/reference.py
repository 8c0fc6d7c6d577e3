"""`fused_moe` in plain torch: slow, readable, and with the arithmetic of the kernel that the row count selects.

Every K block's dot product is taken in float64 and rounded to float32, or in float32 where that is exact in any order.
So a row's bits depend neither on its place in a tile nor on the thread count; what does change bits is what would
change them on the device: the length of a K block, split-k, whether the activation is rounded between the stages, and
how the routes of a token are added up.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.utils.rnn import pad_sequence

from distbench.experts.selection import KernelChoice, KernelSelector
from distbench.workload.bits import Shuffles

_WEIGHT_BYTES = 8 << 20
_WIDE_BYTES = 8 << 20
_ROUTED_BYTES = 256 << 20
# float32 holds multiples of the product of two steps up to this sum.
_STEP = 0.25
_EXACT_SUM = 2.0**24 * _STEP**2


class _Group(NamedTuple):
    """Routes of some experts, padded to one length.

    experts [g]: rows of the local weights. routes [g, m]: numbers in the flat list of a call's routes, and past an
    expert's last one the number that follows the list's end.
    """

    experts: Tensor
    routes: Tensor


class ReferenceExperts:
    """The stand-in for aiter's fused_moe: see `Experts` for the contract. Undefined rows of its output are NaN."""

    def __init__(self, selector: KernelSelector, seed: int) -> None:
        """Select kernels with `selector`; `seed` orders the adds of atomic epilogues."""
        self._selector = selector
        self._arrivals = Shuffles(seed, "atomic")
        self._output: Tensor | None = None
        self._written = 0
        self._widened: dict[int, _Weights] = {}
        self._choices: dict[int, KernelChoice] = {}

    def selection(self, rows: int) -> KernelChoice:
        """See `Experts.selection`."""
        if rows not in self._choices:
            self._choices[rows] = self._selector.choose(rows)
        return self._choices[rows]

    def __call__(  # noqa: PLR0913 - the argument list is aiter's
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weight: Tensor,
        topk_ids: Tensor,
        *,
        expert_mask: Tensor,
        num_local_tokens: Tensor,
        a1_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        """See `Experts.__call__`."""
        rows = hidden_states.shape[0]
        live = min(int(num_local_tokens), rows)
        choice = self.selection(rows)
        output = self._poisoned_output(hidden_states.new_empty(0, hidden_states.shape[1], dtype=dtype), rows)
        step = max(_ROUTED_BYTES // (topk_ids.shape[1] * hidden_states.shape[1] * 4), 1)
        for start in range(0, live, step):
            part = slice(start, min(start + step, live))
            wide = widen(hidden_states[part], None if a1_scale is None else a1_scale[part])
            routed = self._routes(wide, w1, w2, topk_weight[part], topk_ids[part], expert_mask, choice)
            output[part] = self._reduce(routed, choice).to(dtype)
        self._written = max(self._written, live)
        return output

    def _poisoned_output(self, like: Tensor, rows: int) -> Tensor:
        if self._output is None or self._output.shape[0] < rows or self._output.dtype != like.dtype:
            self._output = like.new_full((rows, like.shape[1]), float("nan"))
        else:
            self._output[: self._written].fill_(float("nan"))
        self._written = 0
        return self._output[:rows]

    def _routes(  # noqa: PLR0913 - the argument list is aiter's
        self,
        hidden: Tensor,
        w1: Tensor,
        w2: Tensor,
        weights: Tensor,
        ids: Tensor,
        expert_mask: Tensor,
        choice: KernelChoice,
    ) -> Tensor:
        live, topk = ids.shape
        first, second = self._widen(1, w1), self._widen(2, w2)
        hidden = torch.cat([hidden, hidden.new_zeros(1, hidden.shape[1])])
        flat_weights = torch.cat([weights.flatten(), weights.new_zeros(1)])
        routed = hidden.new_zeros(live * topk + 1, hidden.shape[1])
        local = local_experts(ids, expert_mask).flatten()
        for group in grouped_routes(local, w1.shape[0], w1[0].numel() * 8):
            rows = group.routes.div(topk, rounding_mode="floor")
            routed_in = hidden.index_select(0, rows.flatten()).view(*rows.shape, -1)
            activation = self._stage1(routed_in, first, group.experts, choice)
            result = blocked_product(activation, second, group.experts, choice.tile_k2, 1)
            routed[group.routes] = result * flat_weights[group.routes].unsqueeze(2)
        return routed[:-1].view(live, topk, -1)

    def _widen(self, stage: int, weights: Tensor) -> _Weights:
        """Return a stage's weights for `blocked_product`, made anew for another tensor; nobody writes to a known."""
        known = self._widened.get(stage)
        if known is None or not known.are(weights):
            known = self._widened[stage] = _Weights(weights)
        return known

    @staticmethod
    def _stage1(hidden: Tensor, w1: _Weights, experts: Tensor, choice: KernelChoice) -> Tensor:
        gate, up = blocked_product(hidden, w1, experts, choice.tile_k1, choice.ksplit).chunk(2, dim=2)
        activation = functional.silu(gate) * up
        return activation if choice.run_1stage else activation.bfloat16().float()

    def _reduce(self, routed: Tensor, choice: KernelChoice) -> Tensor:
        live, topk, _ = routed.shape
        rounded = routed.bfloat16()
        if choice.stage2_mode == "reduce":
            total = torch.zeros_like(routed[:, 0])
            for slot in rounded.unbind(1):
                total += slot
            return total.bfloat16()
        order = self._arrivals.next(live * topk, routed.device).view(live, topk).argsort(1)
        order += torch.arange(0, live * topk, topk, device=routed.device).unsqueeze(1)
        arriving = rounded.flatten(0, 1).index_select(0, order.flatten()).view_as(rounded)
        added = torch.zeros_like(arriving[:, 0])
        for one in arriving.unbind(1):
            added += one
        return added


def widen(hidden: Tensor, scales: Tensor | None) -> Tensor:
    """Return hidden rows as float32, block-scaled rows multiplied out."""
    if scales is None:
        return hidden.float()
    rows, columns = hidden.shape
    return (hidden.float().view(rows, scales.shape[1], -1) * scales.unsqueeze(2)).view(rows, columns)


def local_experts(ids: Tensor, expert_mask: Tensor) -> Tensor:
    """Map global ids [n, k] to rows of the local weights, -1 for those of other ranks or of no rank."""
    num_experts = expert_mask.numel()
    rows = torch.full((num_experts + 1,), -1, device=ids.device)
    rows[:num_experts] = (expert_mask.cumsum(0) * (expert_mask == 1)) - 1
    return rows[ids.clamp(-1, num_experts).long()]


def grouped_routes(local: Tensor, num_experts: int, bytes_per_expert: int) -> Iterator[_Group]:
    """Group the routes (flat indices into `local`) by expert, so many experts at a time as memory allows."""
    nowhere, *counts = torch.bincount(local + 1, minlength=num_experts + 1).tolist()
    routes = local.argsort(stable=True)[nowhere:].split(counts)
    used = [expert for expert, count in enumerate(counts) if count]
    step = max(_WEIGHT_BYTES // bytes_per_expert, 1)
    for start in range(0, len(used), step):
        experts = used[start : start + step]
        padded = pad_sequence([routes[expert] for expert in experts], batch_first=True, padding_value=local.numel())
        yield _Group(torch.tensor(experts, device=local.device), padded)


def blocked_product(rows: Tensor, weights: _Weights, experts: Tensor, tile_k: int, splits: int) -> Tensor:
    """Return rows float32 [g, m, K] times the weights of `experts` [g, N, K] transposed, float32 [g, m, N].

    K is walked in blocks of `tile_k`, each rounded to float32 and added in order; with `splits` above one, K is first
    divided into that many runs of blocks, which are summed apart and then added in order. Where no order rounds, one
    product has it all.
    """
    if weights.exact_with(rows):
        return torch.bmm(rows, weights.of(experts)).add_(0.0)  # a sum of nothing but -0.0 begins at +0.0 too
    run = -(-rows.shape[2] // (tile_k * max(splits, 1)))
    total = partial = rows.new_zeros(rows.shape[0], rows.shape[1], weights.rows)
    blocks = zip(rows.double().split(tile_k, dim=2), weights.blocks(experts, tile_k), strict=True)
    for index, (left, right) in enumerate(blocks):
        if index and index % run == 0:
            total = partial if total is partial else total.add_(partial)
            partial = torch.zeros_like(total)
        partial += torch.bmm(left, right).float()
    return total if total is partial else total.add_(partial)


class _Weights:
    """One stage's weights [El, N, K], widened block by block, or once where they are few."""

    def __init__(self, weights: Tensor) -> None:
        self.rows = weights.shape[1]
        self._weights = weights
        self._few = weights.numel() * 8 <= _WIDE_BYTES
        self._wide = weights.float() if self._few else weights
        self._most = _EXACT_SUM / (_largest(self._wide) * weights.shape[2] or 1.0) if self._few else 0.0

    def are(self, weights: Tensor) -> bool:
        """Whether `weights` is the tensor that these are made of."""
        return weights.data_ptr() == self._weights.data_ptr() and weights.shape == self._weights.shape

    def exact_with(self, rows: Tensor) -> bool:
        """Whether products with `rows` float32, added up in any order, are exact in float32."""
        return self._most > 0 and _largest(rows) <= self._most

    def of(self, experts: Tensor) -> Tensor:
        """Return those of `experts` in one piece, [g, K, N], float32 where a product with them can be exact."""
        return (self._wide if experts.numel() == len(self._wide) else self._wide[experts]).transpose(1, 2)

    def blocks(self, experts: Tensor, tile_k: int) -> Iterator[Tensor]:
        """Yield float64 [g, at most tile_k, N] of `experts`, one block of K after another."""
        if self._few:  # as float64 from here on: rows that ask for it once do so again
            self._wide, self._most = self._wide.double(), 0.0
        for block in self._wide.split(tile_k, dim=2):
            yield (block if experts.numel() == len(block) else block[experts]).double().transpose(1, 2)


def _largest(values: Tensor) -> float:
    """Return the largest magnitude of float32 values that all are multiples of _STEP; infinity of others."""
    if values.numel() == 0 or not (_are_whole(values) or _are_whole(values / _STEP)):
        return math.inf
    return _magnitude(values)


def _are_whole(values: Tensor) -> bool:
    return _magnitude(values.frac()) == 0


def _magnitude(values: Tensor) -> float:
    return max(abs(float(end)) for end in values.aminmax())
