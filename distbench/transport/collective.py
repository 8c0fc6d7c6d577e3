"""MoRI's dispatch and combine emulated over `torch.distributed`, one all-to-all each.

All that goes to one peer for one token (payload, scales, weights, ids, token number) travels as one row of bytes. Row
counts are those of the agreed routing, so none are exchanged here.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.errors import DistbenchError
from distbench.transport.base import Dispatched, poison_
from distbench.workload.batch import TokenBatch
from distbench.workload.bits import shuffle
from distbench.workload.routing import destinations

_SUM_BYTES = 64 << 20


class Geometry(NamedTuple):
    """Sizes of one expert-parallel group. `counts` int64 [W, W] on the CPU: rows that rank i sends to rank j."""

    rank: int
    ep_size: int
    num_experts: int
    capacity: int
    counts: Tensor


class _Route(NamedTuple):
    """What follows from a rank's ids [n, k]: rows sent, in order of (destination, token), and where each comes back.

    tokens [s]: the token of each row. position [n, W]: the row that went to a rank, s where none did.
    """

    ids: Tensor
    tokens: Tensor
    position: Tensor


class _Slots(NamedTuple):
    """Which returned row each top-k slot adds, int64 [n, k], and whether it counts: one slot for each rank does."""

    ids: Tensor
    rows: Tensor
    counted: Tensor


class _Plan(NamedTuple):
    """What one dispatch did, until its combine."""

    route: _Route
    slots: Tensor
    sources: Tensor


class _Field(NamedTuple):
    buffer: Tensor
    start: int
    stop: int


class CollectiveTransport:
    """The stand-in for MoRI's IntraNode kernel: see `Transport` for the contract.

    Received rows lie in a seeded random order that changes from call to call, like an order made by atomics, unless
    `shuffled` is false.
    """

    def __init__(
        self, group: dist.ProcessGroup, geometry: Geometry, like: TokenBatch, *, seed: int, shuffled: bool
    ) -> None:
        """Allocate the receive buffer, poisoned; `like` gives the dtypes, the width of the scales and the device."""
        self.capacity = geometry.capacity
        self.facts = {"kernel": "all_to_all"}
        self._group = group
        self._geometry = geometry
        self._seed = seed
        self._shuffled = shuffled
        self._calls = 0
        self._written = 0
        self._route: _Route | None = None
        self._adding: _Slots | None = None
        self._plan: _Plan | None = None
        self._received = self._allocate(like)
        self._fields = self._lay_out()
        self._row_bytes = self._fields[-1].stop + 4

    def dispatch(self, batch: TokenBatch) -> Dispatched:
        """See `Transport.dispatch`.

        Raises:
            DistbenchError: the ids ask for other row counts than the agreed routing.

        """
        geometry = self._geometry
        route = self._route = self._route_of(batch.ids)
        total = int(geometry.counts[:, geometry.rank].sum())
        outgoing = self._pack(batch, route.tokens)
        incoming = outgoing.new_empty(total, self._row_bytes)
        self._exchange(incoming, outgoing, to_experts=True)
        self._plan = _Plan(route=route, slots=self._slots(total, incoming.device), sources=self._sources_of(incoming))
        self._unpack(incoming, self._plan.slots)
        self._calls += 1
        return self._received._replace(total_recv=self._received.total_recv.fill_(total))

    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        """See `Transport.combine`; a row past the end of `expert_out` comes back as poison."""
        plan = self._take_plan(ids)
        outgoing = _rows_or_poison(expert_out, plan.slots)
        incoming = outgoing.new_empty(plan.route.tokens.numel(), expert_out.shape[1])
        self._exchange(incoming.view(torch.uint8), outgoing.view(torch.uint8), to_experts=False)
        return self._sum_slots(torch.cat([incoming, _poison_row(expert_out)]), self._slots_of(ids, plan.route))

    def sources(self) -> Tensor:
        """See `Transport.sources`."""
        if self._plan is None:
            message = "sources() was called with no dispatch under way; call it between dispatch and combine"
            raise DistbenchError(message)
        ordered = torch.empty_like(self._plan.sources)
        ordered[self._plan.slots] = self._plan.sources
        return ordered

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
                fields.append(_Field(buffer.view(torch.uint8), start, stop))
                start = stop
        return fields

    def _route_of(self, ids: Tensor) -> _Route:
        if self._route is not None and torch.equal(self._route.ids, ids):
            return self._route
        geometry = self._geometry
        going = destinations(ids, geometry.num_experts // geometry.ep_size, geometry.ep_size).t()
        self._check_counts(going.sum(1).cpu())
        tokens = going.nonzero()[:, 1]
        position = torch.where(going, going.flatten().cumsum(0).view_as(going) - 1, tokens.numel()).t().contiguous()
        self._adding = None
        return _Route(ids.clone(), tokens, position)

    def _check_counts(self, asked: Tensor) -> None:
        agreed = self._geometry.counts[self._geometry.rank]
        if not torch.equal(asked, agreed):
            message = (
                f"dispatch: the ids ask for {asked.tolist()} rows to each rank, the agreed routing for "
                f"{agreed.tolist()}; the ids changed after the ranks agreed"
            )
            raise DistbenchError(message)

    def _pack(self, batch: TokenBatch, tokens: Tensor) -> Tensor:
        if tokens.numel() == 0:
            return torch.empty(0, self._row_bytes, dtype=torch.uint8, device=tokens.device)
        parts = [part[tokens].view(torch.uint8) for part in batch if part is not None]
        return torch.cat([*parts, tokens.to(torch.int32).view(-1, 1).view(torch.uint8)], dim=1)

    def _unpack(self, incoming: Tensor, slots: Tensor) -> None:
        total = slots.numel()
        for buffer in self._received[:4]:
            if buffer is not None:
                poison_(buffer[total : max(self._written, total)])
        for field in self._fields:
            field.buffer[slots] = incoming[:, field.start : field.stop]
        self._written = total

    def _sources_of(self, incoming: Tensor) -> Tensor:
        by_rank = self._geometry.counts[:, self._geometry.rank].to(incoming.device)
        ranks = torch.arange(self._geometry.ep_size, device=incoming.device).repeat_interleave(by_rank)
        tokens = incoming[:, -4:].contiguous().view(torch.int32).flatten().long()
        return torch.stack([ranks, tokens], dim=1)

    def _slots(self, total: int, device: torch.device) -> Tensor:
        if not self._shuffled:
            return torch.arange(total, device=device)
        return shuffle(self._seed, f"slots/{self._calls}", self._geometry.rank, total, device)

    def _exchange(self, incoming: Tensor, outgoing: Tensor, *, to_experts: bool) -> None:
        sent = self._geometry.counts[self._geometry.rank].tolist()
        received = self._geometry.counts[:, self._geometry.rank].tolist()
        output_splits, input_splits = (received, sent) if to_experts else (sent, received)
        dist.all_to_all_single(incoming, outgoing, output_splits, input_splits, group=self._group)

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
        if self._adding is not None and torch.equal(self._adding.ids, ids):
            return self._adding
        geometry = self._geometry
        owner = ids.long().div(geometry.num_experts // geometry.ep_size, rounding_mode="floor")
        valid = (ids >= 0) & (owner < geometry.ep_size)
        earlier = (owner.unsqueeze(2) == owner.unsqueeze(1)).tril(-1).any(2)
        rows = route.position.gather(1, owner.clamp(0, geometry.ep_size - 1))
        self._adding = _Slots(ids.clone(), rows, (valid & ~earlier).unsqueeze(2))
        return self._adding

    @staticmethod
    def _sum_slots(rows: Tensor, slots: _Slots) -> Tensor:
        tokens, topk = slots.rows.shape
        total = rows.new_zeros(tokens, rows.shape[1], dtype=torch.float32)
        step = max(_SUM_BYTES // (topk * rows.shape[1] * 4), 1)
        for start in range(0, tokens, step):
            part = slice(start, start + step)
            taken = rows[slots.rows[part]].float().masked_fill_(~slots.counted[part], 0.0)
            for slot in taken.unbind(1):
                total[part] += slot
        return total.to(rows.dtype)


def _rows_or_poison(expert_out: Tensor, slots: Tensor) -> Tensor:
    rows = expert_out.shape[0]
    if rows == 0:
        return _poison_row(expert_out).expand(slots.numel(), -1).contiguous()
    taken = expert_out[slots.clamp(max=rows - 1)]
    cut = slots >= rows
    return taken.masked_fill_(cut.unsqueeze(1), float("nan"))


def _poison_row(like: Tensor) -> Tensor:
    row = like.new_empty(1, like.shape[1])
    poison_(row)
    return row
