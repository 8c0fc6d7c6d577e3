"""The experts of a rank: their input, their weights, and the call that every implementation has (docs/semantics.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from distbench.experts.selection.choice import KernelChoice
from distbench.transport.base import Dispatched


class ExpertInput(NamedTuple):
    """Rows for the experts. M, the number of allocated rows, selects the kernel.

    hidden [M, H] in bf16, or float8 with scales [M, H/128] float32; weights [M, k] float32; ids [M, k] int32, global;
    num_local_tokens [1] int32, the live rows.
    """

    hidden: Tensor
    scales: Tensor | None
    weights: Tensor
    ids: Tensor
    num_local_tokens: Tensor

    def fields(self) -> list[Tensor]:
        """Arguments of M rows: hidden, scales where there are some, weights, ids."""
        return [part for part in (self.hidden, self.scales, self.weights, self.ids) if part is not None]

    @property
    def rows(self) -> int:
        """M, the allocated rows."""
        return self.hidden.shape[0]


class ExpertWeights(NamedTuple):
    """A rank's experts in bf16: w1 [El, 2I, H], gate rows before up rows, and w2 [El, H, I].

    mask [E] int32 is 1 where an expert is local. bias1 [El, 2I] and bias2 [El, H], float32, or None.
    """

    w1: Tensor
    w2: Tensor
    mask: Tensor
    bias1: Tensor | None = None
    bias2: Tensor | None = None


class Experts(ABC):
    """Computes the experts of one rank with a kernel that the row count selects.

    Experts whose kernels are compiled when they are first called override `warm_up`; those that compute garbage or
    fault on some values override `check`; those that run an external package override `about`.
    """

    reuses_output = False
    """Whether the next call overwrites the result of this one."""

    @abstractmethod
    def selection(self, rows: int) -> KernelChoice:
        """Return the kernel that a call with `rows` allocated rows runs."""

    @abstractmethod
    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        """Return each row's sum over its local experts, weighted: bf16 [M, H]; valid until the next call.

        Rows at and past num_local_tokens are undefined.
        """

    def warm_up(self, weights: ExpertWeights, rows: tuple[int, ...]) -> None:  # noqa: B027
        """Compile the kernels that calls with these numbers of rows need, once per node."""

    def check(self, given: ExpertInput, weights: ExpertWeights) -> None:  # noqa: B027
        """Refuse bad values, which waits for the device: for checked passes, never timed or captured ones.

        Raises:
            DistbenchError: names the value and the bound.
        """

    def about(self) -> dict[str, Any]:
        """Return, by package name, the facts that decide its results besides the case: versions, devices, tables."""
        return {}


Cut = Callable[[Dispatched], ExpertInput]
