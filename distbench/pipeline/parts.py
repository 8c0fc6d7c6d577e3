"""The parts of a rank that a case runs with."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from distbench.case.stages import Stage
from distbench.experts.base import Cut, Experts, ExpertWeights
from distbench.pipeline.graphs import GraphedExperts
from distbench.pipeline.layer import Inspector, run_layer
from distbench.transport.base import Transport
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload

if TYPE_CHECKING:
    from distbench.callers.base import Caller
    from distbench.faults.injector import Injector


class Parts(NamedTuple):
    """Inputs, weights, transport and experts; where faults are injected, the latter two have them around them.

    `caller` runs the arm production.
    """

    workload: Workload
    batch: TokenBatch
    weights: ExpertWeights
    transport: Transport
    experts: Experts
    injector: Injector | None = None
    caller: Caller | None = None

    def layer(self, cut: Cut, inspect: Inspector | None) -> Callable[[Callable[[Stage], None]], Tensor]:
        """One pass through the layer with `cut`; see `run_layer`."""
        return partial(run_layer, self.batch, self.weights, self.transport, self.experts, cut, inspect)

    @property
    def graphed(self) -> GraphedExperts | None:
        """The experts if they run from graphs, without faults wrapped around them; else None."""
        experts = self.experts if self.injector is None else self.injector.inner
        return experts if isinstance(experts, GraphedExperts) else None
