"""Rows moved and added, by the torch operations that do it at the speed of the memory."""

from __future__ import annotations

import torch
from torch import Tensor

ALIGNMENT_BYTES = 16
# Rows that one step of combine's sum gathers: on a device they should still be in its L2 when they are added.
_GATHERED_BYTES = 32 << 20


def sum_slots(rows: Tensor, slots: Tensor) -> Tensor:
    """Add the rows that each token names, in order, from zero, in float32: [n, H] of rows' dtype."""
    count, width = slots.shape
    total = rows.new_empty(count, rows.shape[1])
    step = max(_GATHERED_BYTES // (width * rows.shape[1] * rows.element_size()), 1)
    for start in range(0, count, step):
        named = slots[start : start + step]
        gathered = rows.new_empty(named.numel(), rows.shape[1])
        take(rows, named.flatten(), gathered)
        _sum_in_order(gathered.view(*named.shape, -1), total[start : start + step])
    return total


def _sum_in_order(rows: Tensor, out: Tensor) -> None:
    """Sum [n, c, H] over c, from +0.0. The sum of two has one order: there a device does with one pass."""
    if rows.shape[1] <= 2 and rows.device.type != "cpu":  # noqa: PLR2004 - see above
        torch.sum(rows, 1, out=out)
        return
    total = rows[:, 0].float().add_(0.0)
    for row in rows[:, 1:].unbind(1):
        total += row
    out.copy_(total)


def take(rows: Tensor, index: Tensor, out: Tensor) -> None:
    """Copy rows[index] to `out`, 16 bytes at a time on a device and whole rows on the CPU, each by the op that does."""
    if index.numel() == 0:
        return
    if rows.device.type == "cpu":
        torch.index_select(rows, 0, index, out=out)
    else:
        torch.ops.aten.index(rows, [index], out=out)


def words(rows: Tensor) -> Tensor:
    """View rows as the widest integers that divide them."""
    size = rows.shape[1] * rows.element_size()
    return rows.view(next(word for word in (torch.int64, torch.int32, torch.uint8) if size % word.itemsize == 0))


def aligned(size: int) -> int:
    """Return the multiple of ALIGNMENT_BYTES that holds `size` bytes."""
    return -(-size // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
