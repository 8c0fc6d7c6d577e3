"""One pass through the MoE layer on one rank: dispatch, truncate, experts, combine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from distbench.case.stages import Stage
from distbench.experts.base import Cut, ExpertInput, Experts, ExpertWeights
from distbench.transport.base import Dispatched, Transport
from distbench.workload.batch import TokenBatch


class Inspector(Protocol):
    """Inspects the buffers of a pass before combine releases them."""

    def __call__(self, sources: Tensor, dispatched: Dispatched, given: ExpertInput, expert_out: Tensor) -> None:
        """Receive sources [total_recv, 2], the receive buffer, the experts' input, and their output."""


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
    mark(Stage.TRUNCATE)
    given = cut(dispatched)
    mark(Stage.EXPERTS)
    if inspect is not None:
        experts.check(given, weights)
    expert_out = experts(given, weights)
    if inspect is not None:
        mark(Stage.CHECK)
        inspect(transport.sources(), dispatched, given, expert_out)
    mark(Stage.COMBINE)
    return transport.combine(expert_out, batch.ids)
