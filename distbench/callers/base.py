"""The contract of every caller: production's code of one rank, between our dispatch and our combine."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

import msgspec
from torch import Tensor

from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.transport.base import Dispatched, Transport
from distbench.workload.batch import TokenBatch


class CallerText(msgspec.Struct, frozen=True, kw_only=True):
    """Origin of the lifted code: the package, its release, the wheel or folder, the files in it, and SHA-256."""

    package: str
    version: str
    origin: str
    files: tuple[str, ...]
    sha256: str

    @property
    def label(self) -> str:
        """Package and release, such as sglang 0.5.23."""
        return f"{self.package} {self.version}"


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

    def about(self) -> dict[str, Any]:
        """Facts of the lifted code, for reports."""
        return {name: getattr(self.text, name) for name in self.text.__struct_fields__}
