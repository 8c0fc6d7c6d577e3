"""The contract of every exchange of rows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

from torch import Tensor

from distbench.distributed.waits import waiting


class Underway(Protocol):
    """Rows in flight."""

    def wait(self) -> object:
        """Wait for the rows; on a device its stream waits, and the host continues."""


class Exchange(Protocol):
    """Exchange of equal-sized rows, uint8 [rows, row bytes] and contiguous, within a group. `name` is for reports.

    `outgoing` has `sent[rank]` rows for each rank, in rank order; `incoming` receives `received[rank]` rows from each.
    Collective; an exchange begins only after the previous one has been waited for.
    """

    name: str

    def start(
        self, incoming: Tensor, outgoing: Tensor, received: Sequence[int], sent: Sequence[int]
    ) -> Sequence[Underway]:
        """Start an exchange and return; the caller must not touch either tensor before it has waited."""

    def run(self, incoming: Tensor, outgoing: Tensor, received: Sequence[int], sent: Sequence[int]) -> None:
        """Exchange rows; on a device its stream waits for them, not the host."""


def wait_for(travel: Iterable[Underway]) -> None:
    """Wait for the rows; on a device its stream waits, and the host continues."""
    with waiting("rows of peers"):
        for rows in travel:
            rows.wait()
