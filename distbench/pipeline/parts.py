"""The parts of a rank that a case runs with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from distbench.case.stages import Stage
from distbench.experts.base import Cut, Experts, ExpertWeights
from distbench.pipeline.graphs import GraphedExperts
from distbench.pipeline.layer import Inspector, run_layer, run_overlapped
from distbench.pipeline.sub_batches import SubBatch
from distbench.transport.base import Transport
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload

if TYPE_CHECKING:
    from distbench.callers.base import Caller
    from distbench.faults.injector import Injector


class Parts(NamedTuple):
    """Inputs, weights, transport and experts; where faults are injected, the latter two have them around them.

    `caller` runs the arm production. With two-batch overlap `sub_batches` run, each with a transport of its own:
    `transport` and `experts` are then those of the first, without faults.
    """

    workload: Workload
    batch: TokenBatch
    weights: ExpertWeights
    transport: Transport
    experts: Experts
    injector: Injector | None = None
    caller: Caller | None = None
    sub_batches: tuple[SubBatch, ...] = ()

    def layer(self, cut: Cut, inspect: Inspector | None) -> Callable[[Callable[[Stage], None]], Tensor]:
        """One pass through the layer with `cut`; see `run_layer` and `run_overlapped`."""
        if self.sub_batches:
            return partial(run_overlapped, self.sub_batches, self.weights, cut, inspect)
        return partial(run_layer, self.batch, self.weights, self.transport, self.experts, cut, inspect)

    def forget(self) -> None:
        """See `Transport.forget`. Collective."""
        for transport in [one.transport for one in self.sub_batches] or [self.transport]:
            transport.forget()

    @property
    def graphed(self) -> GraphedExperts | None:
        """The experts if they run from graphs, without faults wrapped around them; else None."""
        experts = self.experts if self.injector is None else self.injector.inner
        return experts if isinstance(experts, GraphedExperts) else None
