"""The rows a rank sends: one for each token."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class TokenBatch(NamedTuple):
    """Rows as they enter dispatch, and as they must arrive.

    hidden [n, H] bf16, or the device's fp8 with scales float32 [n, H/128]; weights [n, k] float32; ids [n, k] int32,
    global.
    """

    hidden: Tensor
    scales: Tensor | None
    weights: Tensor
    ids: Tensor
