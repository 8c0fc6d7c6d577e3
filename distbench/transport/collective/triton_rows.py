"""Row movement and sums by Triton kernels: one launch per step, whatever the number of fields.

A step's launch is recorded, and repeated with the addresses of the next call's tensors (`utils/recorded_call.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import or_
from typing import Any

from torch import Tensor

from distbench.transport.base import POISON_ID
from distbench.transport.collective import row_kernels
from distbench.transport.collective.arrival import RowCounts
from distbench.transport.collective.route import DispatchState, Room, Route
from distbench.utils.recorded_call import RecordedCall
from distbench.utils.triton_launch import launch

_BLOCK_BYTES = 4096
_FIELDS = 4
# Bytes for which a recorded kernel may assume alignment.
_ADDRESS = 16


class TritonRows:
    """Triton's `Mover`. The rank's own rows move directly between the batch or expert_out and their slots."""

    name = "triton"

    def __init__(self, traffic: RowCounts) -> None:
        self._traffic = traffic
        self._outgoing, self._returned = Room(traffic.arriving), Room(traffic.leaving)
        self._recorded: dict[tuple[object, ...], RecordedCall] = {}

    def leave(self, parts: Sequence[Tensor], route: Route) -> None:
        """See `Mover.leave`; poisons the last combine's rows too."""
        self._move("leave", parts, [lane.leaving for lane in route.lanes], route.leaving, None, self._returned.telling)

    def stay(self, parts: Sequence[Tensor], plan: DispatchState) -> None:
        """See `Mover.stay`."""
        route = plan.route
        self._move("stay", parts, [lane.buffer for lane in route.lanes], route.staying, plan.own_slots, None)

    def arrive(self, plan: DispatchState, total_recv: Tensor) -> None:
        """See `Mover.arrive`; the own rows are there already."""
        if not self._traffic.arriving:
            total_recv.fill_(self._traffic.total_received)
            return
        lanes = plan.route.lanes
        incoming, buffers = [lane.incoming for lane in lanes], [lane.buffer for lane in lanes]
        self._move("arrive", incoming, buffers, None, plan.slots, total_recv)

    def send_back(self, expert_out: Tensor, plan: DispatchState) -> Tensor:
        """See `Mover.send_back`."""
        outgoing, numbers, count = self._outgoing, plan.route.peers_numbers, self._traffic.arriving
        outgoing.of(expert_out)
        if count:
            shape = there, width = expert_out.shape

            def first() -> None:
                block = _block(expert_out)
                given = expert_out, plan.slots, outgoing.rows, numbers, there, POISON_ID
                constants = {"WIDTH": width, "BLOCK": block, "STRIDE": numbers.stride(0)}
                launch(row_kernels.take_back, (count, -(-width // block)), *given, **constants)

            key = "send_back", shape, expert_out.dtype
            self._launch(key, (expert_out, outgoing.rows, numbers), (plan.slots,), first)
        return outgoing.wire

    def room(self, expert_out: Tensor) -> Tensor:
        """See `Mover.room`."""
        self._returned.of(expert_out)
        return self._returned.wire

    def stay_back(self, expert_out: Tensor, plan: DispatchState) -> None:
        """Do nothing: `add` reads the own rows in place."""

    def add(self, expert_out: Tensor, plan: DispatchState, slots: Tensor) -> Tensor:
        """See `Mover.add`."""
        traffic, (count, width), shape = self._traffic, slots.shape, expert_out.shape
        there, columns = shape
        total = expert_out.new_empty(count, columns)
        if count:
            returned = self._returned.rows if traffic.leaving else expert_out  # which is not read
            own_slots = plan.own_slots if traffic.own else slots  # likewise

            def first() -> None:
                block = _block(expert_out) // 2
                given = returned, expert_out, own_slots, slots, total, there, traffic.leaving, traffic.total_sent
                constants = {"COUNT": width, "WIDTH": columns, "BLOCK": block}
                launch(row_kernels.add_rows, (count, -(-columns // block)), *given, **constants)

            key = "add", shape, expert_out.dtype, count, width
            self._launch(key, (returned, expert_out, total), (own_slots, slots), first)
        return total

    def _move(  # noqa: PLR0913 - the parts of a launch
        self,
        step: str,
        sources: Sequence[Tensor],
        targets: Sequence[Tensor],
        picked: Tensor | None,
        put: Tensor | None,
        marked: Tensor | None,
    ) -> None:
        """Copy row picked[i] (i if None) of each source to row put[i] of its target; a step has one launch shape.

        `marked` are columns that a row poisons, or the number of received rows.
        """
        indices = [rows for rows in (picked, put) if rows is not None]
        count = indices[0].numel()
        if not count:
            return

        def first() -> None:
            constants = _shape(sources, targets) | {"PICK": picked is not None, "PUT": put is not None}
            fields = [tensor for pair in zip(sources, targets, strict=True) for tensor in pair]
            fields += [sources[0]] * (2 * _FIELDS - len(fields))
            given = *fields, indices[0], indices[-1], marked, self._traffic.total_received
            blocks = -(-constants["WIDTHS"][0] // constants["BLOCKS"][0])
            launch(row_kernels.move, (count, blocks), *given, **constants, **_marks(marked))

        known = () if marked is None else (marked,)
        key = step, *((one.dtype, one.stride()) for one in known)
        self._launch(key, (*sources, *targets, *known), indices, first)

    def _launch(
        self, key: tuple[object, ...], tensors: Sequence[Tensor], indices: Sequence[Tensor], first: Callable[[], None]
    ) -> None:
        """Repeat the launch of `key` with these tensors, or have `first` make it.

        All are arguments of the launch; of indices the kernel assumes no alignment.
        """
        addresses = [tensor.data_ptr() for tensor in tensors]
        if not all(addresses) or reduce(or_, addresses) % _ADDRESS:  # one is empty, or not aligned
            first()
            return
        recorded = self._recorded.get(key)
        if recorded is not None:
            addresses += [index.data_ptr() for index in indices]
            recorded.repeat(addresses, tensors[0].device)
            return
        call = RecordedCall([*tensors, *indices])
        with call.record():
            first()
        if call.num_launches:
            self._recorded[key] = call


def _shape(sources: Sequence[Tensor], targets: Sequence[Tensor]) -> dict[str, Any]:
    """Return the constants of `row_kernels.move` for these fields; missing fields are 0 words wide."""
    nothing = (0,) * (_FIELDS - len(sources))
    widths = [source.shape[1] for source in sources]
    return {
        "SOURCES": (*(source.stride(0) for source in sources), *nothing),
        "TARGETS": (*(target.stride(0) for target in targets), *nothing),
        "WIDTHS": (*widths, *nothing),
        "BLOCKS": (_block(sources[0]), *map(_whole, widths[1:]), *nothing),
    }


def _marks(marked: Tensor | None) -> dict[str, Any]:
    """Return the constants of `row_kernels.move` for columns [rows, .], or a single number [1], that it marks."""
    if marked is None:
        return {"MARKS": 0, "STRIDE": 0, "FIRST": 0}
    if marked.dim() == 1:
        return {"MARKS": 1, "STRIDE": 0, "FIRST": 1}
    return {"MARKS": 1 << (marked.shape[1].bit_length() - 1), "STRIDE": marked.stride(0), "FIRST": 0}


def _block(rows: Tensor) -> int:
    return min(_BLOCK_BYTES // rows.element_size(), _whole(rows.shape[1]))


def _whole(width: int) -> int:
    """Return the smallest power of two that holds `width` columns."""
    return 1 << (width - 1).bit_length()
