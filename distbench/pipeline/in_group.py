"""A case on the ranks of an existing process group, with functions of the caller in place of a transport or experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from distbench.case.plugins import Plugin
from distbench.errors import BrokenContract, InvalidCase
from distbench.experts.base import ExpertInput, Experts, ExpertsContext, ExpertWeights
from distbench.experts.selection.choice import KernelChoice
from distbench.pipeline.run_case import Brought
from distbench.transport.base import Dispatched, TransportContext, WholeTransport, poison_
from distbench.transport.sources import match_sources
from distbench.utils.text import counted
from distbench.workload.batch import TokenBatch


class Functions(NamedTuple):
    """Functions in place of distbench's own parts; None for its own. See `distbench.api.run_in_group`."""

    dispatch: Callable[[TokenBatch], Dispatched] | None = None
    experts: Callable[[ExpertInput, ExpertWeights], Tensor] | None = None
    combine: Callable[[Tensor, Tensor], Tensor] | None = None

    def brought(self) -> Brought:
        """The functions as plugins.

        Raises:
            InvalidCase: one of dispatch and combine alone.
        """
        dispatch, combine, experts = self.dispatch, self.combine, self.experts
        if (dispatch is None) != (combine is None):
            message = "run_in_group: dispatch and combine go together; give both, or neither"
            raise InvalidCase(message)
        return Brought(
            dispatch and combine and Plugin(make=lambda context: FunctionTransport(context, dispatch, combine)),
            experts and Plugin(make=lambda context: FunctionExperts(context, experts)),
        )


class FunctionTransport(WholeTransport):
    """Dispatch and combine by functions. Received rows are copied into a buffer of the case's capacity.

    A function's dispatch may return any number of rows not below those that it received.
    """

    def __init__(
        self,
        context: TransportContext,
        dispatch: Callable[[TokenBatch], Dispatched],
        combine: Callable[[Tensor, Tensor], Tensor],
    ) -> None:
        self.capacity = context.case.capacity
        self._context, self._dispatch, self._combine = context, dispatch, combine
        like = context.like
        hidden, weights, ids = (
            one.new_empty(self.capacity, one.shape[1]) for one in (like.hidden, like.weights, like.ids)
        )
        scales = None if like.scales is None else like.scales.new_empty(self.capacity, like.scales.shape[1])
        self._buffer = Dispatched(hidden, scales, weights, ids, ids.new_zeros(1))
        self._sent = like
        self._rows = 0

    def dispatch(self, batch: TokenBatch) -> Dispatched:
        """See `Transport.dispatch`.

        Raises:
            BrokenContract: the function returned something else, other types, or fewer or more rows than there can be.
        """
        self._sent = batch
        found = self._dispatch(batch)
        if not isinstance(found, Dispatched):
            message = f"dispatch breaks dispatch.type: it returned a {type(found).__name__}"
            raise BrokenContract(message)
        self._rows = len(found.hidden)
        total = int(found.total_recv)
        if not 0 <= total <= self._rows <= self.capacity:
            message = (
                f"dispatch breaks dispatch.shape: {counted(total, 'row')} received in a buffer of {self._rows}; "
                f"the case's capacity is {self.capacity}"
            )
            raise BrokenContract(message)
        for name, mine in self._buffer._asdict().items():
            if name != "total_recv":
                _check_like(name, getattr(found, name), mine, self._rows)
        for mine, given in zip(self._buffer.fields(), found.fields(), strict=True):
            poison_(mine)
            mine[:total] = given[:total]
        self._buffer.total_recv.fill_(total)
        return self._buffer

    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        """See `Transport.combine`; the function is given as many rows as its dispatch returned, at most."""
        return self._combine(expert_out[: self._rows], ids)

    def sources(self) -> Tensor:
        """See `Transport.sources`; found by content."""
        return match_sources(self._context, self._sent, self._buffer, int(self._buffer.total_recv))


def _check_like(name: str, given: Any, like: Tensor | None, rows: int) -> None:
    """Refuse a field that a copy would convert or repeat; `like` has its dtype, device and columns.

    Raises:
        BrokenContract: names the rule.
    """
    if not isinstance(given, Tensor) or like is None:
        if given is not like:
            message = f"dispatch breaks dispatch.type: {name} is a {type(given).__name__}"
            raise BrokenContract(message)
        return
    found = {"shape": list(given.shape), "dtype": given.dtype, "device": given.device}
    right = {"shape": [rows, like.shape[1]], "dtype": like.dtype, "device": like.device}
    for what, one in right.items():
        if found[what] != one:
            message = f"dispatch breaks dispatch.{what}: {name}: {found[what]} instead of {one}".replace("torch.", "")
            raise BrokenContract(message)


class FunctionExperts(Experts):
    """Experts by a function, of a kernel that depends on no number of rows."""

    def __init__(self, context: ExpertsContext, call: Callable[[ExpertInput, ExpertWeights], Tensor]) -> None:
        self._name, self._call = context.case.experts, call

    def selection(self, rows: int) -> KernelChoice:
        """See `Experts.selection`."""
        return KernelChoice.named(rows, self._name)

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        """See `Experts.__call__`."""
        return self._call(given, weights)
