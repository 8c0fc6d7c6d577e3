"""MoRI's dispatch and combine emulated over any exchange, one row per token and destination rank.

A token's payload, scales, weights, ids and token number travel to a peer as one row of bytes. Row counts are those of
the agreed routing, so none are exchanged here. A rank's own rows stay on it: they are copied while the others travel.
Rows are ordered by peer rank and token, own rows last.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distbench.case.kinds import inputs_of
from distbench.case.plugins import Plugin
from distbench.distributed.exchange import Exchange, Underway, wait_for
from distbench.errors import DistbenchError
from distbench.transport.base import Dispatched, Transport, TransportContext, poison_, refuse_turn
from distbench.transport.collective.arrival import Arrivals, Geometry, RowCounts
from distbench.transport.collective.route import DispatchState, Mover, Route, lanes_of, lay_out, sent_rows, words
from distbench.transport.collective.rows import TorchRows
from distbench.transport.sum_order import SumOrder
from distbench.workload.batch import TokenBatch
from distbench.workload.routing import destinations

# Routes that are kept: arms of one case send the same tokens as they are, and one place further.
_ROUTES = 2


class _Slots(NamedTuple):
    """Returned rows that a token adds, in the order of its top-k slots: int64 [n, min(k, W)].

    One slot per rank counts. Those that count come first; the others refer to no row.
    """

    given: Tensor
    ids: Tensor
    rows: Tensor


class _Returning(NamedTuple):
    """Expert rows on their way back: what the sum of `ids` [n, k] reads, and the exchange under way."""

    expert_out: Tensor
    ids: Tensor
    plan: DispatchState
    travel: Sequence[Underway]


class CollectiveTransport(Transport):
    """Stand-in for MoRI's IntraNode kernel: see `Transport` for the contract.

    Received rows lie in a seeded random order that changes with each call, like an order made by atomics, unless
    `shuffled` is false. Each call erases the rows of earlier ones itself: see `Mover`. On a device neither call waits
    for it once a routing is known: ids passed in the same tensor again count as unchanged, and the tensor must not be
    written to meanwhile.

    A send half starts the exchange of rows and copies the rank's own meanwhile; the receive half waits for it.
    """

    def __init__(  # noqa: PLR0913 - the parts of a transport
        self, exchange: Exchange, geometry: Geometry, like: TokenBatch, *, seed: int, shuffled: bool, kinds: int = 1
    ) -> None:
        """Allocate the receive buffer, poisoned; `like` gives the dtypes, the number of scale columns and device.

        `kinds` of inputs will be dispatched, one after the other.
        """
        self.capacity = geometry.capacity
        self._rows = exchange
        self._geometry = geometry
        self._traffic = RowCounts(geometry)
        self._device = like.ids.device
        self.mover = make_mover(self._traffic, self._device)
        self.sum_order = SumOrder()
        self.facts: dict[str, Any] = {"kernel": exchange.name, "rows": self.mover.name}
        self._arrivals = Arrivals(self._traffic, self._device, seed=seed, shuffled=shuffled, kinds=kinds)
        self._routes: deque[Route] = deque(maxlen=_ROUTES)
        self._adding: deque[tuple[Route, _Slots]] = deque(maxlen=_ROUTES)
        self._plan: DispatchState | None = None
        self._batch: TokenBatch | None = None
        self._fields: list[Tensor] = []
        self._travel: Sequence[Underway] | None = None
        self._returning: _Returning | None = None
        self._received = self._allocate(like)
        self._buffers = [buffer[: self._traffic.total_received] for buffer in self._received.fields()]
        self._layout = lay_out(self._buffers)
        self.facts["row_bytes"] = self._layout.row_bytes
        ranks = self._traffic.source_ranks(self._device)
        self._sources = torch.stack([ranks, torch.zeros_like(ranks)], dim=1)
        self._source_tokens = self._sources[:, 1]

    def dispatch_send(self, batch: TokenBatch) -> None:
        """See `Transport.dispatch_send`.

        Raises:
            DistbenchError: the ids' row counts differ from the agreed routing.
        """
        mover = self.mover
        route = self._route_of(batch.ids)
        plan = self._plan = DispatchState(route, *self._arrivals.next())
        parts = self._fields_of(batch)
        mover.leave(parts, route)
        self._travel = self._exchange(route.from_peers, route.outgoing, to_experts=True)
        mover.stay(parts, plan)

    def dispatch_recv(self) -> Dispatched:
        """See `Transport.dispatch_recv`.

        Raises:
            DistbenchError: no dispatch was begun.
        """
        plan, travel, self._travel = self._plan, self._travel, None
        if plan is None or travel is None:
            refuse_turn("dispatch_recv")
        wait_for(travel)
        self.mover.arrive(plan, self._received.total_recv)
        return self._received

    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        """See `Transport.combine`; on a device its stream waits for the rows, which saves two events."""
        self._returning = self._send_back(expert_out, ids, at_once=True)
        return self.combine_recv()

    def combine_send(self, expert_out: Tensor, ids: Tensor) -> None:
        """See `Transport.combine_send`; a row past the end of `expert_out` comes back as poison."""
        self._returning = self._send_back(expert_out, ids, at_once=False)

    def combine_recv(self) -> Tensor:
        """See `Transport.combine_recv`.

        Raises:
            DistbenchError: no combine was begun.
        """
        back, self._returning = self._returning, None
        if back is None:
            refuse_turn("combine_recv")
        wait_for(back.travel)
        self.mover.stay_back(back.expert_out, back.plan)
        return self.mover.add(back.expert_out, back.plan, self._slots_of(back.ids, back.plan.route).rows)

    def sources(self) -> Tensor:
        """See `Transport.sources`."""
        if self._plan is None:
            refuse_turn("sources")
        self._source_tokens.copy_(self._plan.route.numbers)
        return self._sources.index_select(0, self._plan.rows)

    def _allocate(self, like: TokenBatch) -> Dispatched:
        def rows(tensor: Tensor) -> Tensor:
            buffer = tensor.new_empty(self.capacity, tensor.shape[1])
            poison_(buffer)
            return buffer

        return Dispatched(
            hidden=rows(like.hidden),
            scales=None if like.scales is None else rows(like.scales),
            weights=rows(like.weights),
            ids=rows(like.ids),
            total_recv=like.ids.new_zeros(1),
        )

    def _fields_of(self, batch: TokenBatch) -> list[Tensor]:
        """The batch's fields as contiguous words: those of the call before where they are views of the same batch."""
        if batch is not self._batch:
            parts = [part for part in batch if part is not None]
            self._fields = [words(part.contiguous()) for part in parts]
            self._batch = batch if all(part.is_contiguous() for part in parts) else None
        return self._fields

    def _is_known(self, known: Route | _Slots, ids: Tensor) -> bool:
        """Whether these are the ids of `known`; comparing values on a device would wait for it."""
        return (ids is known.given and self._device.type != "cpu") or torch.equal(known.ids, ids)

    def _route_of(self, ids: Tensor) -> Route:
        for known in self._routes:
            if self._is_known(known, ids):
                return known
        geometry, traffic, layout = self._geometry, self._traffic, self._layout
        going = destinations(ids, geometry.num_experts // geometry.ep_size, geometry.ep_size)
        self._check_counts(going.sum(0).tolist())
        tokens, position = sent_rows(going, traffic)
        leaving, staying = tokens.split([traffic.leaving, traffic.own])
        outgoing, incoming = (
            torch.empty(rows, layout.row_bytes, dtype=torch.uint8, device=self._device)
            for rows in (traffic.leaving, traffic.total_received)
        )
        sent, numbers = (rows[:, layout.number : layout.number + 4].view(torch.int32) for rows in (outgoing, incoming))
        sent[:] = leaving.unsqueeze(1)
        arriving = traffic.arriving
        numbers[arriving:] = staying.unsqueeze(1)
        lanes = lanes_of(layout, self._buffers, outgoing, incoming, arriving)
        received = incoming, incoming[:arriving], numbers[:, 0], numbers[:arriving, 0]
        route = Route(ids, ids.clone(), leaving, staying, position, outgoing, *received, lanes)
        poison_(route.peers_numbers)
        self._routes.append(route)
        return route

    def _check_counts(self, asked: list[int]) -> None:
        if asked != self._traffic.sent:
            message = (
                f"dispatch: the ids send {asked} rows to each rank, the agreed routing {self._traffic.sent}; "
                "the ids changed after the ranks agreed"
            )
            raise DistbenchError(message)

    def _exchange(
        self, incoming: Tensor, outgoing: Tensor, *, to_experts: bool, at_once: bool = False
    ) -> Sequence[Underway]:
        """Exchange rows between ranks; nothing for a single rank. With `at_once` the rows are there on return."""
        if self._geometry.ep_size == 1:
            return ()
        received, sent = self._traffic.from_peers, self._traffic.to_peers
        received, sent = (received, sent) if to_experts else (sent, received)
        if not at_once:
            return self._rows.start(incoming, outgoing, received, sent)
        self._rows.run(incoming, outgoing, received, sent)
        return ()

    def _send_back(self, expert_out: Tensor, ids: Tensor, *, at_once: bool) -> _Returning:
        plan, mover = self._take_plan(ids), self.mover
        outgoing, incoming = mover.send_back(expert_out, plan), mover.room(expert_out)
        return _Returning(expert_out, ids, plan, self._exchange(incoming, outgoing, to_experts=False, at_once=at_once))

    def _take_plan(self, ids: Tensor) -> DispatchState:
        plan, self._plan = self._plan, None
        if plan is None or self._travel is not None:
            refuse_turn("combine")
        if ids.shape[0] != plan.route.ids.shape[0]:
            message = (
                f"combine: ids have {ids.shape[0]} rows, this rank dispatched {plan.route.ids.shape[0]} tokens; "
                "pass the rank's own routing, not the ids that dispatch returned"
            )
            raise DistbenchError(message)
        return plan

    def _slots_of(self, ids: Tensor, route: Route) -> _Slots:
        for way, known in self._adding:
            if way is route and self._is_known(known, ids):
                return known
        geometry = self._geometry
        owner = ids.long().div(geometry.num_experts // geometry.ep_size, rounding_mode="floor")
        valid = (ids >= 0) & (owner < geometry.ep_size)
        earlier = (owner.unsqueeze(2) == owner.unsqueeze(1)).tril(-1).any(2)
        counted = valid & ~earlier
        rows = route.position.gather(1, owner.clamp(0, geometry.ep_size - 1))
        rows = torch.where(counted, rows, self._traffic.total_sent + 1)
        first = (~counted).to(torch.uint8).argsort(dim=1, stable=True)[:, : geometry.ep_size]
        slots = _Slots(ids, ids.clone(), rows.gather(1, first))
        self._adding.append((route, slots))
        return slots


def make_mover(traffic: RowCounts, device: torch.device) -> Mover:
    """Return the mover for `device`: Triton kernels on an accelerator that supports them, else torch's operations."""
    if device.type != "cpu" and find_spec("triton") is not None:
        from distbench.transport.collective.triton_rows import TritonRows  # noqa: PLC0415 - a rank loads only what it uses

        return TritonRows(traffic)
    return TorchRows(traffic)


def make(context: TransportContext) -> CollectiveTransport:
    """Return the transport of a rank, over the exchange that its group allows."""
    from distbench.distributed.all_to_all import AllToAll  # noqa: PLC0415 - a rank loads only what it uses
    from distbench.distributed.choose import choose_exchange  # noqa: PLC0415 - as above

    case, session = context.case, context.session
    geometry = Geometry(
        rank=context.rank,
        ep_size=case.ep_size,
        num_experts=case.placed_experts,
        capacity=case.capacity,
        counts=context.counts,
    )
    shuffled = case.slot_order == "shuffled"
    if case.two_batch_overlap:  # exchanges of both sub-batches are under way at once, which memory is not made for
        exchange: Exchange = AllToAll(context.group)
    else:
        exchange = choose_exchange(context.group, session.shared, context.counts, context.device)
    kinds = len(inputs_of(case))
    return CollectiveTransport(exchange, geometry, context.like, seed=case.seed, shuffled=shuffled, kinds=kinds)


PLUGIN = Plugin(make=make, name="collective", two_batch_overlap=True)
