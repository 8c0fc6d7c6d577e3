"""`fused_moe` in plain torch: slow, readable, and arithmetically the kernel that the row count selects.

Every K block's dot product is taken in float64 and rounded to float32 (see `distbench.experts.blocked_matmul`). So a
row's bits depend neither on its place in a tile nor on the thread count. They depend on the same properties as on the
device: the length of a K block, split-k, whether the activation is rounded between the stages, and the order in which a
token's routes are summed.

float8 rows are computed as production does: bf16 weights are rounded to e4m3 per 128 x 128 block, and the intermediate
per 128 columns of each row, in the format of the rows.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

import torch
from torch import Tensor

from distbench.case.plugins import Plugin
from distbench.errors import Unsupported
from distbench.experts.base import ExpertInput, Experts, ExpertsContext, ExpertWeights
from distbench.experts.blocked_matmul import Weights
from distbench.experts.roundings import Scales
from distbench.experts.selection.choice import KernelChoice, KernelSelector
from distbench.experts.steps import Group, Steps
from distbench.workload.bits import RowShuffles
from distbench.workload.formula import Formula
from distbench.workload.quantize import through_weight_blocks

WEIGHT_BYTES = 8 << 20
# Rows of an expert are padded to whole fours, which MKL multiplies at once: 19 rows in float64 take 1.2 times as long
# as 20, since each of the last three is a product of its own.
_ROWS = 4
_ROUTED_BYTES = 256 << 20

T = TypeVar("T")


class _Kept(Generic[T]):
    """Cache of the value derived from the last tensor; a cached tensor must not be written to."""

    def __init__(self, make: Callable[[Tensor], T]) -> None:
        self._make = make
        self._known: tuple[Tensor, T] | None = None

    def of(self, tensor: Tensor) -> T:
        """Return the value derived from `tensor`."""
        known = self._known
        if known is None or (known[0].data_ptr(), known[0].shape) != (tensor.data_ptr(), tensor.shape):
            known = self._known = tensor, self._make(tensor)
        return known[1]


class ReferenceExperts(Experts):
    """Stand-in for aiter's fused_moe: see `Experts` for the contract. Undefined rows of its output are NaN."""

    reuses_output = True

    def __init__(
        self,
        selector: KernelSelector,
        seed: int,
        scales: Scales = "power of two",
        formula: Formula = Formula(),  # noqa: B008 - frozen
    ) -> None:
        """Select kernels with `selector`; `seed` orders atomic adds; `scales` are those of an fp8 intermediate.

        float32 weights count as quantised and dequantised already.
        """
        self._scales: Scales = scales
        self.steps = Steps(formula)
        self._selector = selector
        self._arrivals = RowShuffles(seed, "atomic")
        self._output: Tensor | None = None
        self._written = 0
        self._first, self._second, self._local = _Kept(Weights), _Kept(Weights), _Kept(local_rows)
        self._narrow: dict[torch.dtype, tuple[_Kept[Weights], _Kept[Weights]]] = {}
        self._choices: dict[int, KernelChoice] = {}

    def selection(self, rows: int) -> KernelChoice:
        """See `Experts.selection`.

        Raises:
            Unsupported: a tuned row has a bf16 kernel of one stage, and a limit is asked for.
        """
        if rows not in self._choices:
            choice = self._choices[rows] = self._selector.choose(rows)
            if choice.run_1stage and self._selector.layer.quant == "bf16" and self.steps.formula.limit:
                message = f"{rows} rows: {choice.stage1!r:.80}: no kernel of one stage clamps at a limit; drop its row"
                raise Unsupported(message)
        return self._choices[rows]

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        """See `Experts.__call__`."""
        return self.compute(given, weights, torch.bfloat16)

    def compute(self, given: ExpertInput, weights: ExpertWeights, dtype: torch.dtype) -> Tensor:
        """Make the call, with a result of `dtype`."""
        live = min(int(given.num_local_tokens), given.rows)
        choice = self.selection(given.rows)
        columns = given.hidden.shape[1]
        output = self._poisoned_output(given.hidden, dtype, given.rows, live)
        step = max(_ROUTED_BYTES // (given.ids.shape[1] * columns * 4), 1)
        narrow = None if given.scales is None else given.hidden.dtype
        for start in range(0, live, step):
            part = slice(start, min(start + step, live))
            wide = self.steps.widen(given.hidden[part], None if given.scales is None else given.scales[part])
            routed = self._routes(wide, given.weights[part], given.ids[part], weights, choice, narrow)
            output[part] = self._reduce(routed, choice).to(dtype)
        return output

    def _poisoned_output(self, like: Tensor, dtype: torch.dtype, rows: int, live: int) -> Tensor:
        """Return the output [rows, H], of which the caller writes the first `live` rows; the others are NaN."""
        if self._output is None or self._output.shape[0] < rows or self._output.dtype != dtype:
            self._output = like.new_full((rows, like.shape[1]), float("nan"), dtype=dtype)
            self._written = 0
        if self._written > live:
            self._output[live : self._written].fill_(float("nan"))
        self._written = live
        return self._output[:rows]

    def _routes(  # noqa: PLR0913 - a part of the input, and the kernel
        self,
        hidden: Tensor,
        routing_weights: Tensor,
        ids: Tensor,
        weights: ExpertWeights,
        choice: KernelChoice,
        narrow: torch.dtype | None,
    ) -> Tensor:
        live, topk = ids.shape
        first, second = self._weights(weights, narrow)
        flat_weights = routing_weights.flatten()
        routed = hidden.new_zeros(live * topk + 1, hidden.shape[1])
        local = local_experts(ids, self._local.of(weights.mask)).flatten()
        for group in grouped_routes(local, weights.w1.shape[0], weights.w1.shape[1:].numel() * 8):
            flat = group.routes.flatten()
            known = flat.clamp(max=group.total - 1)  # past an expert's last route any row will do
            rows = known.div(topk, rounding_mode="floor")
            routed_in = hidden.index_select(0, rows).view(*group.routes.shape, -1)
            made = self.steps.first(routed_in, first, group, choice)
            shares = flat_weights.index_select(0, known).view(group.routes.shape)
            if self.steps.formula.weigh_first:
                made = self.steps.weigh(made, shares, group)
            if weights.bias1 is not None:
                made = self.steps.bias(made, weights.bias1, group)
            intermediate = self.steps.activate(*made.chunk(2, dim=2))
            if not choice.run_1stage:
                intermediate = self.steps.store(intermediate)
            if narrow is not None:
                intermediate = self.steps.requantise(intermediate, narrow, self._scales)
            result = self.steps.second(intermediate, second, group, choice)
            if weights.bias2 is not None:
                result = self.steps.bias(result, weights.bias2, group)
            if not self.steps.formula.weigh_first:
                result = self.steps.weigh(result, shares, group)
            routed.index_copy_(0, flat, result.flatten(0, 1))
        return routed[:-1].view(live, topk, -1)

    def _weights(self, weights: ExpertWeights, narrow: torch.dtype | None) -> tuple[Weights, Weights]:
        """Return both weights as the kernel holds them."""
        if narrow is None or weights.w1.dtype is not torch.bfloat16:
            return self._first.of(weights.w1), self._second.of(weights.w2)
        if narrow not in self._narrow:
            self._narrow[narrow] = (
                _Kept(lambda weights: Weights(through_halves(weights, narrow))),
                _Kept(lambda weights: Weights(through_weight_blocks(weights, narrow))),
            )
        first, second = self._narrow[narrow]
        return first.of(weights.w1), second.of(weights.w2)

    def _reduce(self, routed: Tensor, choice: KernelChoice) -> Tensor:
        live, topk, _ = routed.shape
        rounded = self.steps.round(routed)
        if choice.stage2_mode == "reduce":
            return self.steps.add(rounded, torch.float32)
        order = self._arrivals.next(live, topk, routed.device)
        arriving = rounded.flatten(0, 1).index_select(0, order).view_as(rounded)
        return self.steps.add(arriving, torch.bfloat16)


def through_halves(w1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return w1 bf16 [El, 2I, H] after a round trip through e4m3 `dtype`, gate and up rows in separate blocks."""
    return through_weight_blocks(w1.view(2 * w1.shape[0], -1, w1.shape[2]), dtype).view(w1.shape)


def local_rows(expert_mask: Tensor) -> Tensor:
    """Return the local weight row of each expert in a mask [E], -1 for others and for one extra entry at the end."""
    rows = torch.full((expert_mask.numel() + 1,), -1, device=expert_mask.device)
    rows[:-1] = (expert_mask.cumsum(0) * (expert_mask == 1)) - 1
    return rows


def local_experts(ids: Tensor, rows: Tensor) -> Tensor:
    """Map global ids [n, k] through `local_rows`; -1 for experts of other ranks or of no rank."""
    return rows.take(ids.clamp(-1, rows.shape[0] - 1).long())


def grouped_routes(
    local: Tensor, num_experts: int, bytes_per_expert: int, memory: int = WEIGHT_BYTES
) -> Iterator[Group]:
    """Group routes (flat indices into `local`) by expert; `memory` in bytes bounds the number of experts at a time.

    An expert has as many rows as the fullest one of its group, and up to 3 more: products of whole fours cost least.
    A device gets the indices of all groups in one copy, for which the host waits.
    """
    total = local.numel()
    routes: list[list[int]] = [[] for _ in range(num_experts)]
    for route, expert in enumerate(local.tolist()):
        if expert >= 0:
            routes[expert].append(route)
    used = [expert for expert, some in enumerate(routes) if some]
    step = max(memory // bytes_per_expert, 1)
    together = [used[start : start + step] for start in range(0, len(used), step)]
    indices: list[int] = []
    for experts in together:
        rows = _whole_fours(max(len(routes[expert]) for expert in experts))
        indices += experts
        for expert in experts:
            indices += routes[expert] + [total] * (rows - len(routes[expert]))
    if not indices:
        return
    left = torch.frombuffer(array("q", indices), dtype=torch.int64).to(local.device)  # a third of torch.tensor's time
    for experts in together:
        rows = _whole_fours(max(len(routes[expert]) for expert in experts))
        chosen, padded, left = left.split_with_sizes(
            [len(experts), len(experts) * rows, left.shape[0] - len(experts) * (rows + 1)]
        )
        run = slice(experts[0], experts[-1] + 1) if experts[-1] - experts[0] == len(experts) - 1 else None
        yield Group(chosen, padded.view(len(experts), rows), total, run)


def _whole_fours(rows: int) -> int:
    return -(-rows // _ROWS) * _ROWS


def make(context: ExpertsContext) -> ReferenceExperts:
    """Return the experts of a case."""
    from distbench.experts import make_selector  # noqa: PLC0415 - the package imports none of its modules, nor they it
    from distbench.experts.formulas import formula_of  # noqa: PLC0415 - as above

    return ReferenceExperts(make_selector(context.case), context.case.seed, formula=formula_of(context.case))


PLUGIN = Plugin(make=make, name="reference")
