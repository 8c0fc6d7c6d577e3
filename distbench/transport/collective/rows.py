"""Row movement and sums by torch's own operations: on the CPU, and on devices without Triton."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distbench.transport.base import poison_
from distbench.transport.collective.arrival import RowCounts
from distbench.transport.collective.route import DispatchState, Room, Route

# Rows that one step of combine's sum gathers: on a device they should still be in its L2 for the add.
_GATHERED_BYTES = 32 << 20


class TorchRows:
    """Torch's `Mover`. The rank's own rows share the memory of the peers' rows, so one gather reads both."""

    name = "torch"

    def __init__(self, traffic: RowCounts) -> None:
        self.sum_in_order = sum_in_order
        self._traffic = traffic
        self._outgoing, self._returned = Room(traffic.arriving), Room(traffic.leaving, traffic.own + 2)

    def leave(self, parts: Sequence[Tensor], route: Route) -> None:
        """See `Mover.leave`."""
        for part, lane in zip(parts, route.lanes, strict=True):
            _take(part, route.leaving, lane.leaving)

    def stay(self, parts: Sequence[Tensor], plan: DispatchState) -> None:
        """See `Mover.stay`."""
        for part, lane in zip(parts, plan.route.lanes, strict=True):
            _take(part, plan.route.staying, lane.staying)
        if self._returned.telling is not None:
            poison_(self._returned.telling)

    def arrive(self, plan: DispatchState, total_recv: Tensor) -> None:
        """See `Mover.arrive`."""
        total_recv.fill_(self._traffic.total_received)
        for lane in plan.route.lanes:
            _take(lane.incoming, plan.rows, lane.buffer)

    def send_back(self, expert_out: Tensor, plan: DispatchState) -> Tensor:
        """See `Mover.send_back`."""
        self._outgoing.of(expert_out)
        self._take_back(expert_out, plan.slots, self._outgoing.rows)
        poison_(plan.route.peers_numbers)
        return self._outgoing.wire

    def room(self, expert_out: Tensor) -> Tensor:
        """See `Mover.room`; the last two rows are poison and zeros."""
        if self._returned.of(expert_out):
            self._returned.rows[-1].zero_()
        return self._returned.wire

    def stay_back(self, expert_out: Tensor, plan: DispatchState) -> None:
        """See `Mover.stay_back`."""
        self._take_back(expert_out, plan.own_slots, self._returned.rows[self._traffic.leaving : -2])

    def add(self, expert_out: Tensor, plan: DispatchState, slots: Tensor) -> Tensor:  # noqa: ARG002
        """See `Mover.add`."""
        returned = self._returned.rows
        count, width = slots.shape
        total = returned.new_empty(count, returned.shape[1])
        step = max(_GATHERED_BYTES // (width * returned.shape[1] * returned.element_size()), 1)
        for start, named in zip(range(0, count, step), slots.split(step), strict=False):  # no rows are one part
            gathered = returned.new_empty(named.numel(), returned.shape[1])
            _take(returned, named.flatten(), gathered)
            self.sum_in_order(gathered.view(*named.shape, -1), total[start : start + step])
        return total

    def _take_back(self, expert_out: Tensor, slots: Tensor, out: Tensor) -> None:
        rows = expert_out.shape[0]
        if rows >= self._traffic.total_received:
            _take(expert_out, slots, out)
            return
        if rows:
            _take(expert_out, slots.clamp(max=rows - 1), out)
        out.masked_fill_((slots >= rows).unsqueeze(1), float("nan"))


def _take(rows: Tensor, index: Tensor, out: Tensor) -> None:
    """Copy rows[index] to `out`, by 16 bytes on a device and by whole rows on the CPU, with the faster op for each."""
    if index.numel() == 0:
        return
    if rows.is_cpu:
        torch.index_select(rows, 0, index, out=out)
    else:
        torch.ops.aten.index(rows, [index], out=out)


def sum_in_order(rows: Tensor, out: Tensor) -> None:
    """Sum [n, c, H] over c, from +0.0. A sum of two has one order, so a device does it in one pass."""
    if rows.shape[1] <= 2 and rows.device.type != "cpu":  # noqa: PLR2004 - see above
        torch.sum(rows, 1, out=out)
        return
    first, *others = rows.unbind(1)
    total = first.float().add_(0.0)
    for row in others:
        total += row
    out.copy_(total)
