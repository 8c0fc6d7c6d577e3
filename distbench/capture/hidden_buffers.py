"""Host memory into which a device copies the hidden states of a dispatch: allocated once, lent and given back."""

from __future__ import annotations

from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MOST_ROOMS = 64
_SHARE = 4
_BLOCK = 128
_FP8 = {torch.float8_e4m3fn: "e4m3fn", torch.float8_e4m3fnuz: "e4m3fnuz"}

Hidden = tuple[Tensor, Tensor | None]
"""Hidden states [n, H] as sent, and scales float32 [n, H / 128] with fp8."""


class Room(NamedTuple):
    """Room for a dispatch: hidden states [rows, H], scales or None, and both as arrays; `kind` is their format."""

    hidden: Tensor
    scales: Tensor | None
    kind: str
    arrays: tuple[Any, ...]

    def begin(self, sent: Hidden) -> bool:
        """Enqueue the copies; False where other hidden states than those that the room was made for are sent."""
        hidden, scales = sent
        count = len(hidden)
        if kind_of(sent) != self.kind or hidden.shape[1] != self.hidden.shape[1] or count > len(self.hidden):
            return False
        self.hidden[:count].copy_(hidden, non_blocking=True)
        if scales is not None and self.scales is not None:
            self.scales[:count].copy_(scales, non_blocking=True)
        return True


def kind_of(sent: Hidden | None) -> str:
    """Format of hidden states: bf16, e4m3fn or e4m3fnuz with a scale for each 128 columns; empty for others."""
    if sent is None or sent[0].ndim != 2:  # noqa: PLR2004
        return ""
    hidden, scales = sent
    if scales is None:
        return "bf16" if hidden.dtype is torch.bfloat16 else ""
    blocks = hidden.shape[0], hidden.shape[1] // _BLOCK
    whole = hidden.shape[1] % _BLOCK == 0 and scales.dtype is torch.float32 and scales.shape == blocks
    return _FP8.get(hidden.dtype, "") if whole else ""


def make_rooms(sent: Hidden, rows: int, most: int) -> deque[Room]:
    """Rooms of `rows` tokens like those of `sent`: 1 to 64, in a quarter of `most` bytes; none where one is larger."""
    kind, (hidden, scales) = kind_of(sent), sent
    size = rows * hidden.shape[1] * hidden.element_size()
    count = min(max(most // _SHARE // max(size, 1), 1), _MOST_ROOMS) if size <= most else 0
    pinned, made = hidden.is_cuda, deque[Room]()
    with torch.inference_mode(mode=False):  # memory that steps in and out of that mode write to
        for _ in range(count):
            bits = torch.empty(rows, hidden.shape[1], dtype=hidden.dtype, pin_memory=pinned)
            blocks = None if scales is None else torch.empty(rows, scales.shape[1], pin_memory=pinned)
            words = bits.view(torch.uint8 if kind != "bf16" else torch.int16).numpy()
            made.append(Room(bits, blocks, kind, (words, None if blocks is None else blocks.numpy())))
    return made
