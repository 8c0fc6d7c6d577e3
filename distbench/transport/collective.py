"""MoRI's dispatch and combine emulated over `torch.distributed`, one all-to-all each.

All that goes to one peer for one token (payload, scales, weights, ids, token number) travels as one row of bytes. Row
counts are those of the agreed routing, so none are exchanged here. A rank's own rows stay on it: they are copied while
the others travel. Rows are ordered by the other rank and by token, own rows last.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.errors import DistbenchError
from distbench.transport.arrival import Arrivals, Geometry, Traffic
from distbench.transport.base import Dispatched, poison_
from distbench.transport.rows import ALIGNMENT_BYTES, aligned, sum_slots, take, words
from distbench.transport.waiting import wait_for
from distbench.workload.batch import TokenBatch
from distbench.workload.routing import destinations


class _Lane(NamedTuple):
    """One field of the rows that travel, as words: views of those that leave, those that stay, and all received."""

    leaving: Tensor
    staying: Tensor
    incoming: Tensor


class _Route(NamedTuple):
    """What follows from a rank's ids [n, k]: the tokens of the rows that leave and stay, and where each comes back.

    `given` is the tensor that held the ids, `ids` a copy. position [n, W]: the row that went to a rank, as many as are
    sent where none did. `outgoing` and `incoming` are uint8 [rows, row bytes], the rows that leave and all received;
    `lanes` are their fields.
    """

    given: Tensor
    ids: Tensor
    leaving: Tensor
    staying: Tensor
    position: Tensor
    outgoing: Tensor
    incoming: Tensor
    unheard: Tensor
    lanes: list[_Lane]


class _Slots(NamedTuple):
    """Which returned rows a token adds, in the order of its top-k slots: int64 [n, min(k, W)].

    One slot for each rank counts. Those that do come first; the others name a row of zeros.
    """

    given: Tensor
    ids: Tensor
    rows: Tensor


class _Plan(NamedTuple):
    """What one dispatch did, until its combine: its route and its order of the receive buffer."""

    route: _Route
    slots: Tensor
    rows: Tensor


class _Field(NamedTuple):
    """A part of a row: the receive buffer's, as words, and the bytes that it takes in a row that travels."""

    buffer: Tensor
    start: int
    stop: int

    def lane(self, outgoing: Tensor, incoming: Tensor, arriving: int) -> _Lane:
        """Return this part of rows uint8 [rows, row bytes], of which `arriving` come from peers."""
        leaving, received = (rows[:, self.start : self.stop].view(self.buffer.dtype) for rows in (outgoing, incoming))
        return _Lane(leaving, received[arriving:], received)


class CollectiveTransport:
    """The stand-in for MoRI's IntraNode kernel: see `Transport` for the contract.

    Received rows lie in a seeded random order that changes from call to call, like an order made by atomics, unless
    `shuffled` is false. On a device neither call waits for it, once a routing is known: ids that are passed in the same
    tensor again are taken as unchanged, and nobody may write to it meanwhile.
    """

    def __init__(
        self, group: dist.ProcessGroup, geometry: Geometry, like: TokenBatch, *, seed: int, shuffled: bool
    ) -> None:
        """Allocate the receive buffer, poisoned; `like` gives the dtypes, the width of the scales and the device."""
        self.capacity = geometry.capacity
        self.facts = {"kernel": "all_to_all"}
        self._group = group
        self._geometry = geometry
        self._traffic = Traffic(geometry)
        self._device = like.ids.device
        self._arrivals = Arrivals(self._traffic, self._device, seed=seed, shuffled=shuffled)
        self._route: _Route | None = None
        self._adding: _Slots | None = None
        self._plan: _Plan | None = None
        self._received = self._allocate(like)
        self._fields = self._lay_out()
        self._token_start = aligned(self._fields[-1].stop)
        self._row_bytes = self._token_start + ALIGNMENT_BYTES
        self._source_ranks = self._traffic.source_ranks(self._device)

    def dispatch(self, batch: TokenBatch) -> Dispatched:
        """See `Transport.dispatch`.

        Raises:
            DistbenchError: the ids ask for other row counts than the agreed routing.

        """
        traffic = self._traffic
        route = self._route = self._route_of(batch.ids)
        self._plan = _Plan(route, *self._arrivals.next())
        parts = [words(part.contiguous()) for part in batch if part is not None]
        for part, lane in zip(parts, route.lanes, strict=True):
            take(part, route.leaving, lane.leaving)
        poison_(route.unheard)
        travel = self._exchange(route.incoming[: traffic.arriving], route.outgoing, to_experts=True)
        for part, lane in zip(parts, route.lanes, strict=True):
            take(part, route.staying, lane.staying)
        if travel is not None:
            wait_for(travel)
        for field, lane in zip(self._fields, route.lanes, strict=True):
            take(lane.incoming, self._plan.rows, field.buffer)
        return self._received._replace(total_recv=self._received.total_recv.fill_(traffic.total_received))

    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        """See `Transport.combine`; a row past the end of `expert_out` comes back as poison."""
        plan, traffic = self._take_plan(ids), self._traffic
        outgoing = expert_out.new_empty(traffic.arriving, expert_out.shape[1])
        incoming = expert_out.new_empty(traffic.total_sent + 2, expert_out.shape[1])
        poison_(incoming[-2])
        incoming[-1].zero_()
        self._take_rows(expert_out, plan.slots[: traffic.arriving], outgoing)
        travel = self._exchange(
            incoming[: traffic.leaving].view(torch.uint8), outgoing.view(torch.uint8), to_experts=False
        )
        self._take_rows(expert_out, plan.slots[traffic.arriving :], incoming[traffic.leaving : -2])
        slots = self._slots_of(ids, plan.route)
        if travel is not None:
            wait_for(travel)
        return sum_slots(incoming, slots.rows)

    def sources(self) -> Tensor:
        """See `Transport.sources`."""
        if self._plan is None:
            message = "sources() was called with no dispatch under way; call it between dispatch and combine"
            raise DistbenchError(message)
        raw = self._plan.route.incoming[:, self._token_start : self._token_start + 4]
        tokens = raw.view(torch.int32).flatten().long()
        return torch.stack([self._source_ranks, tokens], dim=1)[self._plan.rows]

    def close(self) -> None:
        """See `Transport.close`."""

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

    def _lay_out(self) -> list[_Field]:
        fields, start = [], 0
        for buffer in self._received[:4]:
            if buffer is not None:
                stop = start + buffer.shape[1] * buffer.element_size()
                fields.append(_Field(words(buffer)[: self._traffic.total_received], start, stop))
                start = aligned(stop)
        return fields

    def _is_known(self, known: _Route | _Slots, ids: Tensor) -> bool:
        """Whether these are the ids of `known`; comparing them on a device would wait for it."""
        return (ids is known.given and self._device.type != "cpu") or torch.equal(known.ids, ids)

    def _route_of(self, ids: Tensor) -> _Route:
        if self._route is not None and self._is_known(self._route, ids):
            return self._route
        geometry, traffic = self._geometry, self._traffic
        going = destinations(ids, geometry.num_experts // geometry.ep_size, geometry.ep_size).t()
        self._check_counts(going.sum(1).tolist())
        rank = geometry.rank
        going = torch.cat([going[:rank], going[rank + 1 :], going[rank : rank + 1]])
        tokens = going.nonzero()[:, 1]
        position = torch.where(going, going.flatten().cumsum(0).view_as(going) - 1, tokens.numel())
        position = torch.cat([position[:rank], position[-1:], position[rank:-1]]).t().contiguous()
        outgoing = torch.empty(traffic.leaving, self._row_bytes, dtype=torch.uint8, device=self._device)
        incoming = outgoing.new_empty(traffic.total_received, self._row_bytes)
        leaving, staying = tokens[: traffic.leaving], tokens[traffic.leaving :]
        numbers = incoming[:, self._token_start :].view(torch.int32)
        numbers[traffic.arriving :] = staying.unsqueeze(1)
        outgoing[:, self._token_start :].view(torch.int32)[:] = leaving.unsqueeze(1)
        unheard, self._adding = numbers[: traffic.arriving], None
        lanes = [field.lane(outgoing, incoming, traffic.arriving) for field in self._fields]
        return _Route(ids, ids.clone(), leaving, staying, position, outgoing, incoming, unheard, lanes)

    def _check_counts(self, asked: list[int]) -> None:
        if asked != self._traffic.sent:
            message = (
                f"dispatch: the ids ask for {asked} rows to each rank, the agreed routing for {self._traffic.sent}; "
                "the ids changed after the ranks agreed"
            )
            raise DistbenchError(message)

    def _exchange(self, incoming: Tensor, outgoing: Tensor, *, to_experts: bool) -> dist.Work | None:
        """Start the rows' travel between ranks; nothing travels where there is one rank."""
        if self._geometry.ep_size == 1:
            return None
        output_splits, input_splits = self._traffic.from_peers, self._traffic.to_peers
        if not to_experts:
            output_splits, input_splits = input_splits, output_splits
        travel: dist.Work | None = dist.all_to_all_single(
            incoming, outgoing, output_splits, input_splits, group=self._group, async_op=True
        )
        return travel

    def _take_rows(self, expert_out: Tensor, slots: Tensor, out: Tensor) -> None:
        rows = expert_out.shape[0]
        if rows >= self._traffic.total_received:
            take(expert_out, slots, out)
            return
        if rows:
            take(expert_out, slots.clamp(max=rows - 1), out)
        out.masked_fill_((slots >= rows).unsqueeze(1), float("nan"))

    def _take_plan(self, ids: Tensor) -> _Plan:
        plan, self._plan = self._plan, None
        if plan is None:
            message = "combine() was called with no dispatch under way; the two strictly alternate"
            raise DistbenchError(message)
        if ids.shape[0] != plan.route.ids.shape[0]:
            message = (
                f"combine: ids have {ids.shape[0]} rows, this rank dispatched {plan.route.ids.shape[0]} tokens; "
                "pass the rank's own routing, not the ids that dispatch returned"
            )
            raise DistbenchError(message)
        return plan

    def _slots_of(self, ids: Tensor, route: _Route) -> _Slots:
        if self._adding is not None and self._is_known(self._adding, ids):
            return self._adding
        geometry = self._geometry
        owner = ids.long().div(geometry.num_experts // geometry.ep_size, rounding_mode="floor")
        valid = (ids >= 0) & (owner < geometry.ep_size)
        earlier = (owner.unsqueeze(2) == owner.unsqueeze(1)).tril(-1).any(2)
        counted = valid & ~earlier
        rows = route.position.gather(1, owner.clamp(0, geometry.ep_size - 1))
        rows = torch.where(counted, rows, self._traffic.total_sent + 1)
        first = (~counted).to(torch.uint8).argsort(dim=1, stable=True)[:, : geometry.ep_size]
        self._adding = _Slots(ids, ids.clone(), rows.gather(1, first))
        return self._adding
