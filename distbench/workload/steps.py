"""How many rows are made at a time: what a CPU's caches hold, and on a device enough to make up for the launches."""

from __future__ import annotations

import torch

_ON_DEVICE = 16


def rows_at_a_time(budget: int, row: int, device: torch.device) -> int:
    """Return how many rows of size `row` fit `budget`, which is for the CPU and in the same unit; one at least."""
    return max(budget * (1 if device.type == "cpu" else _ON_DEVICE) // max(row, 1), 1)
