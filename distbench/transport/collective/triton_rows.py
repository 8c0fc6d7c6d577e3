"""Row movement and sums by Triton kernels: one launch per step, whatever the number of fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from distbench.transport.collective import row_kernels
from distbench.transport.collective.arrival import RowCounts
from distbench.transport.collective.route import DispatchState, Room, Route
from distbench.utils.triton_launch import launch

_BLOCK_BYTES = 4096
_FIELDS = 4


class TritonRows:
    """Triton's `Mover`. The rank's own rows move directly between the batch or expert_out and their slots."""

    name = "triton"

    def __init__(self, traffic: RowCounts) -> None:
        self._traffic = traffic
        self._outgoing, self._returned = Room(traffic.arriving), Room(traffic.leaving, traffic.leaving)
        self._shapes: dict[str, dict[str, Any]] = {}

    def leave(self, parts: Sequence[Tensor], route: Route) -> None:
        """See `Mover.leave`."""
        self._move("leave", parts, [lane.leaving for lane in route.lanes], route.leaving, None)

    def stay(self, parts: Sequence[Tensor], plan: DispatchState) -> None:
        """See `Mover.stay`."""
        route = plan.route
        self._move("stay", parts, [lane.buffer for lane in route.lanes], route.staying, plan.own_slots)
        self._returned.poison()

    def arrive(self, plan: DispatchState) -> None:
        """See `Mover.arrive`; the own rows are there already."""
        lanes = plan.route.lanes
        self._move("arrive", [lane.incoming for lane in lanes], [lane.buffer for lane in lanes], None, plan.slots)

    def send_back(self, expert_out: Tensor, plan: DispatchState) -> Tensor:
        """See `Mover.send_back`."""
        count, width = self._traffic.arriving, expert_out.shape[1]
        outgoing = self._outgoing.of(expert_out)
        if count:
            block = _block(expert_out)
            given = expert_out, plan.slots, outgoing, expert_out.shape[0]
            launch(row_kernels.take_back, (count, -(-width // block)), *given, WIDTH=width, BLOCK=block)
        return outgoing

    def room(self, expert_out: Tensor) -> Tensor:
        """See `Mover.room`."""
        return self._returned.of(expert_out)

    def stay_back(self, expert_out: Tensor, plan: DispatchState, returned: Tensor) -> None:
        """Do nothing: `add` reads the own rows in place."""

    def add(self, expert_out: Tensor, plan: DispatchState, returned: Tensor, slots: Tensor) -> Tensor:
        """See `Mover.add`."""
        (count, width), columns = slots.shape, expert_out.shape[1]
        total = expert_out.new_empty(count, columns)
        if count:
            block = _block(expert_out) // 2
            launch(
                row_kernels.add_rows,
                (count, -(-columns // block)),
                returned,
                expert_out,
                plan.own_slots,
                slots,
                total,
                expert_out.shape[0],
                self._traffic.leaving,
                self._traffic.total_sent,
                COUNT=width,
                WIDTH=columns,
                BLOCK=block,
            )
        return total

    def _move(
        self,
        step: str,
        sources: Sequence[Tensor],
        targets: Sequence[Tensor],
        picked: Tensor | None,
        put: Tensor | None,
    ) -> None:
        """Copy row picked[i] (i if None) of each source to row put[i] of its target; a step has one launch shape."""
        rows = picked if picked is not None else put
        if rows is None or rows.numel() == 0:
            return
        if step not in self._shapes:
            self._shapes[step] = _shape(sources, targets) | {"PICK": picked is not None, "PUT": put is not None}
        constants = self._shapes[step]
        fields = [tensor for pair in zip(sources, targets, strict=True) for tensor in pair]
        fields += [sources[0]] * (2 * _FIELDS - len(fields))
        indices = rows if picked is None else picked, rows if put is None else put
        blocks = -(-constants["WIDTHS"][0] // constants["BLOCKS"][0])
        launch(row_kernels.move, (rows.numel(), blocks), *fields, *indices, **constants)


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


def _block(rows: Tensor) -> int:
    return min(_BLOCK_BYTES // rows.element_size(), _whole(rows.shape[1]))


def _whole(width: int) -> int:
    """Return the smallest power of two that holds `width` columns."""
    return 1 << (width - 1).bit_length()
