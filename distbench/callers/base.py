"""The contract of every caller: production's code of one rank, between our dispatch and our combine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from distbench.callers.text import CallerText
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.transport.base import Dispatched, Transport
from distbench.workload.batch import TokenBatch


class Call(NamedTuple):
    """One call of `fused_moe`: what it was given, its output, and the arguments that differ from distbench's own call.

    `differing` maps an argument to both values, production's first.
    """

    given: ExpertInput
    output: Tensor
    differing: dict[str, tuple[str, str]]


Check = Callable[[ExpertInput], None]


class CallerPass(ABC):
    """One pass of production's code through the layer; the steps are called once each, in this order."""

    @abstractmethod
    def dispatch(self) -> Dispatched:
        """Run production's dispatch over our transport: the receive buffer. Collective."""

    @abstractmethod
    def cut(self) -> None:
        """Run production's code between dispatch and the experts."""

    @abstractmethod
    def experts(self, check: Check | None) -> Call:
        """Run production's call of `fused_moe`; `check` sees the input before the kernels do."""

    @abstractmethod
    def combine(self) -> Tensor:
        """Run production's combine over our transport: this rank's tokens, bf16 [n, H]. Collective."""


class Caller(ABC):
    """Production's code of one package, for one rank and one case."""

    text: CallerText

    @abstractmethod
    def start(self, batch: TokenBatch, weights: ExpertWeights, transport: Transport) -> CallerPass:
        """Begin a pass with this rank's tokens."""
