"""Host memory into which a device copies while the step goes on: allocated once, lent and given back."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

_BYTES = 32 << 20
_LEAST, _MOST = 512, 2048


class Buffers(NamedTuple):
    """Room for a dispatch: ids int32 [rows, k], weights float32 [rows, k] or None, total_recv int32 [1]; the arrays."""

    ids: Tensor
    weights: Tensor | None
    total_recv: Tensor
    arrays: tuple[Any, ...]


def make_buffers(rows: int, topk: int, *, weighed: bool, pinned: bool) -> deque[Buffers]:
    """Buffers of `rows` tokens: 32 MiB, but at least 512 and at most 2,048."""
    size = rows * topk * (8 if weighed else 4)
    count = min(max(_BYTES // max(size, 1), _LEAST), _MOST)
    with torch.inference_mode(mode=False):  # memory that steps in and out of that mode write to
        ids = torch.empty(count, rows, topk, dtype=torch.int32, pin_memory=pinned).unbind()
        shares = torch.empty(count, rows, topk, pin_memory=pinned).unbind() if weighed else [None] * count
        rows_received = torch.empty(count, 1, dtype=torch.int32, pin_memory=pinned).unbind()
    parts = zip(ids, shares, rows_received, strict=True)
    return deque(Buffers(*one, _arrays(*one)) for one in parts)


def _arrays(*parts: Tensor | None) -> tuple[Any, ...]:
    return tuple(None if part is None else part.numpy() for part in parts)
