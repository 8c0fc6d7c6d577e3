"""The contract of every transport, which follows MoRI (docs/semantics.md)."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.errors import DistbenchError
from distbench.transport.sum_order import SumOrder
from distbench.workload.batch import TokenBatch

if TYPE_CHECKING:
    import torch.distributed as dist

    from distbench.distributed.session import Session

POISON_ID = 0x7FFF_0000
_NEEDED = {
    "dispatch_recv": "dispatch_send()",
    "sources": "a dispatch; call it between dispatch and combine",
    "combine": "a dispatch; the two strictly alternate",
    "combine_recv": "combine_send()",
}


class TransportContext(NamedTuple):
    """One rank of a case, for the factory of its transport; the ranks call it together.

    `group` are the ranks of the case, in which this one is `rank`; `device` is where its tensors are. `counts` int64
    [W, W], on the CPU, has the rows that each rank will send to each; `like` is a batch of the case's shapes and
    dtypes. `options` is an instance of the plugin's own type. `session` is distbench's own, and no stable interface.
    """

    case: Case
    options: Any
    rank: int
    device: torch.device
    group: dist.ProcessGroup
    counts: Tensor
    like: TokenBatch
    session: Session


class Dispatched(NamedTuple):
    """A rank's receive buffer after dispatch: views of memory that the transport owns and reuses.

    hidden [R, H], scales [R, S] or None, weights [R, k] float32, ids [R, k] int32 (global), total_recv [1] int32, all
    on the rank's device. Rows `[0, total_recv)` are received, in no defined order; the others are stale. Readable
    until this rank enters combine.
    """

    hidden: Tensor
    scales: Tensor | None
    weights: Tensor
    ids: Tensor
    total_recv: Tensor

    def fields(self) -> list[Tensor]:
        """Buffers with a row for each received row: hidden, scales where there are some, weights, ids."""
        return [part for part in (self.hidden, self.scales, self.weights, self.ids) if part is not None]


class Transport(ABC):
    """Moves tokens to the ranks that hold their experts, and the results back.

    `dispatch` and `combine` are collective and strictly alternate, on ranks without tokens too. Each has two halves,
    named as MoRI's: what a send half was given must stay as it is until its receive half returns, and between the two
    a rank may compute, or use another transport (see `WholeTransport` for one without halves). `capacity` are the rows
    of the receive buffer, the case's. `facts` describes the way rows move, for reports; `sum_order` is the order in
    which combine adds. A transport whose memory outlives a call overrides `forget`, one that holds a package's
    operator `close`.
    """

    capacity: int
    sends_early = True
    """Whether a send half sends, or only takes its arguments for the receive half to send."""
    local_slots = False
    """Whether a received row has ids and weights of this rank's experts alone, and -1 and 0 in its other slots."""
    facts: dict[str, Any] = {}  # noqa: RUF012 - each transport sets its own
    sum_order: SumOrder = SumOrder()

    def dispatch(self, batch: TokenBatch) -> Dispatched:
        """Send each token once to every rank that holds one of its experts: both halves."""
        self.dispatch_send(batch)
        return self.dispatch_recv()

    @abstractmethod
    def dispatch_send(self, batch: TokenBatch) -> None:
        """Begin a dispatch; its rows may be under way when this returns."""

    @abstractmethod
    def dispatch_recv(self) -> Dispatched:
        """End the dispatch that was begun: the rows are there. On a device its stream waits, and the host goes on."""

    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        """Return the tokens of `combine_recv`: both halves."""
        self.combine_send(expert_out, ids)
        return self.combine_recv()

    @abstractmethod
    def combine_send(self, expert_out: Tensor, ids: Tensor) -> None:
        """Begin to send the experts' rows back.

        expert_out [at most R, H] has one row for each received row, with routing weights applied. ids [n, k] int32 is
        this rank's own routing, never the ids that dispatch returned.
        """

    @abstractmethod
    def combine_recv(self) -> Tensor:
        """Return the sum of this rank's tokens: [n, H] of expert_out's dtype, zeros where no expert was valid.

        They stay until the next call. Contributions are added in the order of the top-k slots, in float32, with one
        rounding. One whose row a rank did not return, past its cut, is NaN.
        """

    @abstractmethod
    def sources(self) -> Tensor:
        """Return (source rank, source token) of each received row, int64 [total_recv, 2]; before combine."""

    def forget(self) -> None:  # noqa: B027
        """Erase rows of earlier calls from memory, so that a later call that moves no rows cannot pass.

        Collective; before a dispatch. Timed passes omit it.
        """

    def close(self) -> None:  # noqa: B027
        """Release the buffers, after the last combine. Collective."""

    def about(self) -> dict[str, Any]:
        """Return, by package name, the facts that decide its results besides the case; see `Experts.about`."""
        return {}


class WholeTransport(Transport):
    """A transport whose dispatch and combine are one call each, made in the receive half."""

    sends_early = False
    __batch: TokenBatch | None = None
    __returning: tuple[Tensor, Tensor] | None = None

    @abstractmethod
    def dispatch(self, batch: TokenBatch) -> Dispatched:
        """Send each token once to every rank that holds one of its experts; see `Transport`."""

    @abstractmethod
    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        """Return the sum of this rank's tokens; see `Transport.combine_send` and `Transport.combine_recv`."""

    def dispatch_send(self, batch: TokenBatch) -> None:
        """Keep the batch for the receive half."""
        self.__batch = batch

    def dispatch_recv(self) -> Dispatched:
        """See `Transport.dispatch_recv`.

        Raises:
            DistbenchError: no dispatch was begun.
        """
        batch, self.__batch = self.__batch, None
        if batch is None:
            refuse_turn("dispatch_recv")
        return self.dispatch(batch)

    def combine_send(self, expert_out: Tensor, ids: Tensor) -> None:
        """Keep the rows for the receive half."""
        self.__returning = expert_out, ids

    def combine_recv(self) -> Tensor:
        """See `Transport.combine_recv`.

        Raises:
            DistbenchError: no combine was begun.
        """
        back, self.__returning = self.__returning, None
        if back is None:
            refuse_turn("combine_recv")
        return self.combine(*back)


def refuse_turn(call: str) -> NoReturn:
    """Refuse a call, a key of `_NEEDED`, that came before the one it needs.

    Raises:
        DistbenchError: names both.

    """
    message = f"{call}() was called without {_NEEDED[call]}"
    raise DistbenchError(message)


class TransportAround(Transport):
    """A transport around another one, which does all that is not overridden."""

    def __init__(self, inner: Transport) -> None:
        self.capacity, self.sum_order, self.sends_early = inner.capacity, inner.sum_order, inner.sends_early
        self.facts, self.local_slots = inner.facts, inner.local_slots
        self._inner = inner

    def dispatch_send(self, batch: TokenBatch) -> None:
        """See `Transport.dispatch_send`."""
        self._inner.dispatch_send(batch)

    def dispatch_recv(self) -> Dispatched:
        """See `Transport.dispatch_recv`."""
        return self._inner.dispatch_recv()

    def combine_send(self, expert_out: Tensor, ids: Tensor) -> None:
        """See `Transport.combine_send`."""
        self._inner.combine_send(expert_out, ids)

    def combine_recv(self) -> Tensor:
        """See `Transport.combine_recv`."""
        return self._inner.combine_recv()

    def sources(self) -> Tensor:
        """See `Transport.sources`."""
        return self._inner.sources()

    def forget(self) -> None:
        """See `Transport.forget`."""
        self._inner.forget()

    def close(self) -> None:
        """See `Transport.close`."""
        self._inner.close()

    def about(self) -> dict[str, Any]:
        """See `Transport.about`."""
        return self._inner.about()


def poison_(rows: Tensor) -> None:
    """Fill rows that must not be read: NaN, or an expert id that no model has."""
    if rows.dtype.is_floating_point:
        if rows.element_size() == 1:
            rows.view(torch.uint8).fill_(0x80 if rows.dtype is torch.float8_e4m3fnuz else 0x7F)
        else:
            rows.fill_(float("nan"))
    else:
        rows.fill_(POISON_ID)
