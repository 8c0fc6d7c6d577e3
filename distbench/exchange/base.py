"""What every way of exchanging rows does."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor


class Underway(Protocol):
    """Rows that travel."""

    def wait(self) -> object:
        """Return when they are there; on a device the device waits, and the host goes on."""


class Exchange(Protocol):
    """Rows of one size, uint8 [rows, row bytes] and contiguous, between all ranks of a group. `name` is for reports.

    `outgoing` has so many rows for each rank as `sent` says, in the order of ranks, and `incoming` gets so many as
    `received` says. Collective; the next begins when the last has been waited for.
    """

    name: str

    def start(
        self, incoming: Tensor, outgoing: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Sequence[Underway]:
        """Let rows travel while the caller goes on, which leaves both tensors alone until it has waited."""

    def run(self, incoming: Tensor, outgoing: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
        """Return when the rows are there; on a device its stream waits for them, not the host."""
