"""Where a rank waits for rows that travel: whoever reads its stack knows this file as a place of waiting (hang.py)."""

from __future__ import annotations

from collections.abc import Iterable

from distbench.exchange.base import Underway


def wait_for(travel: Iterable[Underway]) -> None:
    """Return when the rows are there; on a device the device waits, and the host goes on."""
    for rows in travel:
        rows.wait()
