"""Rows moved and added by Triton kernels: a launch for each step, whatever the number of fields."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from distbench.transport import row_kernels
from distbench.transport.arrival import Traffic
from distbench.transport.route import Plan, Route

_BLOCK_BYTES = 4096
_FIELDS = 4


class TritonRows:
    """See `Mover`. The rank's own rows go straight between the batch or expert_out and their places."""

    name = "triton"

    def __init__(self, traffic: Traffic) -> None:
        self._traffic = traffic

    def leave(self, parts: Sequence[Tensor], route: Route) -> None:
        """See `Mover.leave`."""
        _move([(part, lane.leaving) for part, lane in zip(parts, route.lanes, strict=True)], route.leaving, None)

    def stay(self, parts: Sequence[Tensor], plan: Plan) -> None:
        """See `Mover.stay`."""
        route = plan.route
        pairs = [(part, lane.buffer) for part, lane in zip(parts, route.lanes, strict=True)]
        _move(pairs, route.staying, plan.slots[self._traffic.arriving :])

    def arrive(self, plan: Plan) -> None:
        """See `Mover.arrive`; the own rows lie there already."""
        _move([(lane.incoming, lane.buffer) for lane in plan.route.lanes], None, plan.slots[: self._traffic.arriving])

    def send_back(self, expert_out: Tensor, plan: Plan) -> Tensor:
        """See `Mover.send_back`."""
        count, width = self._traffic.arriving, expert_out.shape[1]
        outgoing = expert_out.new_empty(count, width)
        if count:
            block = _block(expert_out)
            row_kernels.take_back[(count, -(-width // block))](
                expert_out, plan.slots, outgoing, expert_out.shape[0], WIDTH=width, BLOCK=block
            )
        return outgoing

    def room(self, expert_out: Tensor) -> Tensor:
        """See `Mover.room`."""
        return expert_out.new_empty(self._traffic.leaving, expert_out.shape[1])

    def stay_back(self, expert_out: Tensor, plan: Plan, returned: Tensor) -> None:
        """Leave the own rows where they are, for `add` to read."""

    def add(self, expert_out: Tensor, plan: Plan, returned: Tensor, slots: Tensor) -> Tensor:
        """See `Mover.add`."""
        (count, width), columns = slots.shape, expert_out.shape[1]
        total = expert_out.new_empty(count, columns)
        if count:
            block = _block(expert_out) // 2
            row_kernels.add_rows[(count, -(-columns // block))](
                returned,
                expert_out,
                plan.slots[self._traffic.arriving :],
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


def _move(pairs: list[tuple[Tensor, Tensor]], sources: Tensor | None, targets: Tensor | None) -> None:
    """Copy row sources[i] of each pair's first to row targets[i] of its second; None for i."""
    rows = sources if sources is not None else targets
    if rows is None or rows.numel() == 0:
        return
    blocks = [_block(source) for source, _ in pairs]
    widths = [source.shape[1] for source, _ in pairs]
    missing = _FIELDS - len(pairs)
    fields: list[Any] = [tensor for pair in pairs for tensor in pair] + [pairs[0][0]] * (2 * missing)
    nothing = (0,) * missing
    row_kernels.move[(rows.numel(), -(-widths[0] // blocks[0]))](
        *fields,
        rows if sources is None else sources,
        rows if targets is None else targets,
        SOURCES=(*(source.stride(0) for source, _ in pairs), *nothing),
        TARGETS=(*(target.stride(0) for _, target in pairs), *nothing),
        WIDTHS=(*widths, *nothing),
        BLOCKS=(blocks[0], *map(_whole, widths[1:]), *nothing),
        PICK=sources is not None,
        PUT=targets is not None,
    )


def _block(rows: Tensor) -> int:
    return min(_BLOCK_BYTES // rows.element_size(), _whole(rows.shape[1]))


def _whole(width: int) -> int:
    """Return the power of two that holds `width` columns."""
    return 1 << (width - 1).bit_length()
