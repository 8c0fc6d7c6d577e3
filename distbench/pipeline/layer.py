"""One pass through the MoE layer on one rank: dispatch, truncate, experts, combine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from distbench.case.stages import Stage
from distbench.experts.base import Cut, ExpertInput, Experts, ExpertWeights
from distbench.pipeline.sub_batches import SubBatch
from distbench.transport.base import Dispatched, Transport
from distbench.workload.batch import TokenBatch


class Inspector(Protocol):
    """Inspects the buffers of a pass before combine releases them."""

    def arrived(self, dispatched: Dispatched, sub_batch: int = 0) -> None:
        """Look at the receive buffer before the cut; the host does not wait for a device."""

    def given(self, given: ExpertInput, sub_batch: int = 0) -> None:
        """Look at the experts' input before they run; the host does not wait for a device."""

    def __call__(
        self, sources: Tensor, dispatched: Dispatched, given: ExpertInput, expert_out: Tensor, sub_batch: int = 0
    ) -> None:
        """Receive sources [total_recv, 2], the receive buffer, the experts' input, and their output.

        `sub_batch` is the index of that of two-batch overlap; its sources are numbered in the whole batch.
        """


def run_layer(  # noqa: PLR0913 - the parts of a layer
    batch: TokenBatch,
    weights: ExpertWeights,
    transport: Transport,
    experts: Experts,
    cut: Cut,
    inspect: Inspector | None,
    mark: Callable[[Stage], None],
) -> Tensor:
    """This rank's combined tokens, bf16 [n, H]; `mark` is called with each stage as it begins.

    Without `inspect` the host inspects nothing. Collective: every rank calls it, even without tokens.
    """
    mark(Stage.DISPATCH)
    dispatched = transport.dispatch(batch)
    if inspect is not None:
        inspect.arrived(dispatched)
    mark(Stage.TRUNCATE)
    given = cut(dispatched)
    mark(Stage.EXPERTS)
    if inspect is not None:
        inspect.given(given)
        experts.check(given, weights)
    expert_out = experts(given, weights)
    if inspect is not None:
        mark(Stage.CHECK)
        inspect(transport.sources(), dispatched, given, expert_out)
    mark(Stage.COMBINE)
    return transport.combine(expert_out, batch.ids)


def run_overlapped(
    sub_batches: tuple[SubBatch, ...],
    weights: ExpertWeights,
    cut: Cut,
    inspect: Inspector | None,
    mark: Callable[[Stage], None],
) -> Tensor:
    """This rank's combined tokens, bf16 [n, H], as `run_layer`, of two sub-batches that overlap. Collective.

    The order is that of SGLang 0.5.23 for prefill (`_compute_moe_deepseek_blog_prefill` of
    `batch_overlap/operations_strategy.py`, both started together): B's rows travel while A's experts compute, A's while
    B's do. A timed pass marks each stage once, where the first sub-batch begins it.
    """
    first, second = sub_batches
    mark(Stage.DISPATCH)
    first.transport.dispatch_send(first.batch)
    second.transport.dispatch_send(second.batch)
    made = _received_and_computed(first, weights, cut, inspect, mark)
    if inspect is not None:
        mark(Stage.COMBINE)
    first.transport.combine_send(made.clone() if first.experts.reuses_output else made, first.batch.ids)
    made = _received_and_computed(second, weights, cut, inspect, _ignore if inspect is None else mark)
    mark(Stage.COMBINE)
    second.transport.combine_send(made, second.batch.ids)
    return torch.cat([one.transport.combine_recv() for one in sub_batches])


def _received_and_computed(
    one: SubBatch, weights: ExpertWeights, cut: Cut, inspect: Inspector | None, mark: Callable[[Stage], None]
) -> Tensor:
    """Expert rows of one sub-batch, whose dispatch was begun: bf16 [M, H]."""
    if one.place:
        mark(Stage.DISPATCH)
    dispatched = one.transport.dispatch_recv()
    if inspect is not None:
        inspect.arrived(dispatched, one.place)
    mark(Stage.TRUNCATE)
    given = one.around(cut)(dispatched)
    mark(Stage.EXPERTS)
    if inspect is not None:
        inspect.given(given, one.place)
        one.experts.check(given, weights)
    made = one.experts(given, weights)
    if inspect is not None:
        mark(Stage.CHECK)
        inspect(one.sources(), dispatched, given, made, one.place)
    return made


def _ignore(_: Stage) -> None:
    """Mark nothing."""
