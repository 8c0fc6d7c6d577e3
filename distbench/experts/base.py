"""The experts of a rank: their input, their weights, and the call that every implementation has (docs/semantics.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from distbench.case.spec import Case
from distbench.experts.selection.choice import KernelChoice
from distbench.transport.base import Dispatched

if TYPE_CHECKING:
    from distbench.experts.roundings import Roundings


class ExpertsContext(NamedTuple):
    """One case, for the factory of its experts. `options` is an instance of the plugin's own type."""

    case: Case
    options: Any = None


class ExpertInput(NamedTuple):
    """Rows for the experts. M, the number of allocated rows, selects the kernel.

    hidden [M, H] in bf16, or float8 with scales [M, H/128] float32; weights [M, k] float32; ids [M, k] int32, global;
    num_local_tokens [1] int32, the live rows: more than M where a cut was too short.
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
        """Return the kernel that a call with `rows` allocated rows runs; `KernelChoice.named` makes one by name."""

    @abstractmethod
    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        """Return each row's sum over its local experts, weighted: bf16 [M, H]; valid until the next call.

        Rows at and past num_local_tokens are undefined. It writes to none of its arguments.
        """

    def warm_up(self, weights: ExpertWeights, rows: tuple[int, ...]) -> None:  # noqa: B027
        """Compile the kernels that calls with these numbers of rows need, once per node."""

    def check(self, given: ExpertInput, weights: ExpertWeights) -> None:  # noqa: B027
        """Refuse bad values, which waits for the device: for checked passes, never timed or captured ones.

        Raises:
            DistbenchError: names the value and the bound.
        """

    def roundings(self, choice: KernelChoice) -> Roundings | None:  # noqa: ARG002 - each overrides it or not
        """Return the roundings of a correct kernel, from which gaussian errors are judged; None for aiter's."""
        return None

    def about(self) -> dict[str, Any]:
        """Return, by package name, the facts that decide its results besides the case: versions, devices, tables."""
        return {}


class ExpertsAround(Experts):
    """Experts around others, `inner`, which do all that is not overridden."""

    def __init__(self, inner: Experts) -> None:
        self.reuses_output = inner.reuses_output
        self.inner = inner

    def selection(self, rows: int) -> KernelChoice:
        """See `Experts.selection`."""
        return self.inner.selection(rows)

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        """See `Experts.__call__`."""
        return self.inner(given, weights)

    def warm_up(self, weights: ExpertWeights, rows: tuple[int, ...]) -> None:
        """See `Experts.warm_up`."""
        self.inner.warm_up(weights, rows)

    def check(self, given: ExpertInput, weights: ExpertWeights) -> None:
        """See `Experts.check`."""
        self.inner.check(given, weights)

    def roundings(self, choice: KernelChoice) -> Roundings | None:
        """See `Experts.roundings`."""
        return self.inner.roundings(choice)

    def about(self) -> dict[str, Any]:
        """See `Experts.about`."""
        return self.inner.about()


Cut = Callable[[Dispatched], ExpertInput]
