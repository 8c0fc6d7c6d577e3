"""The contract of every caller: production's code of one rank, between our transport and our experts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from distbench.callers.setting import Setting
from distbench.callers.text import CallerText
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.transport.base import Dispatched, Transport
from distbench.workload.batch import TokenBatch

if TYPE_CHECKING:
    from distbench.experts.aiter.adapter import AiterExperts


class CallerContext(NamedTuple):
    """One rank of a case, for the factory of its caller; `experts` are aiter's, or its stand-in's."""

    setting: Setting
    experts: AiterExperts


class Call(NamedTuple):
    """One call of `fused_moe`: what it was given, the rows given to combine, and arguments unlike distbench's own.

    `differing` maps an argument to both values, production's first.
    """

    given: ExpertInput
    output: Tensor
    differing: dict[str, tuple[str, str]]


class Steps(ABC):
    """What a pass of production's code reports as it reaches our parts; called once each, in this order."""

    @abstractmethod
    def dispatched(self) -> None:
        """The receive buffer is there, and production's code goes on with it."""

    @abstractmethod
    def given(self, given: ExpertInput) -> None:
        """See the input of `fused_moe` before the kernels do."""

    @abstractmethod
    def made(self, dispatched: Dispatched, call: Call) -> None:
        """See the buffers before combine releases them."""


class Caller(ABC):
    """Production's code of one package, for one rank and one case; `text` says which code it is, for reports."""

    text: CallerText

    @abstractmethod
    def run(self, batch: TokenBatch, weights: ExpertWeights, transport: Transport, steps: Steps) -> Tensor:
        """Run production's code of one layer: this rank's tokens, bf16 [n, H]. Collective.

        Raises:
            DistbenchError: an error in production's code, or in a part that it calls; names the release.

        """
