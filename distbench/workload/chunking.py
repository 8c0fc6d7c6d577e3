"""Chunk sizes in rows: bounded by the CPU's caches; on a device, large enough to amortise launches."""

from __future__ import annotations

import torch

_ON_DEVICE = 16


def rows_at_a_time(budget: int, row: int, device: torch.device) -> int:
    """Return the number of rows of size `row` that fit `budget`, the CPU's, in the same unit; at least one."""
    return max(budget * (1 if device.type == "cpu" else _ON_DEVICE) // max(row, 1), 1)
