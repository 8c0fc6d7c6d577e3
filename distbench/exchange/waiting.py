"""The wait for rows that travel."""

from __future__ import annotations

from collections.abc import Iterable

from distbench.exchange.base import Underway
from distbench.waits import waiting


def wait_for(travel: Iterable[Underway]) -> None:
    """Return when the rows are there; on a device the device waits, and the host goes on."""
    with waiting("rows of peers"):
        for rows in travel:
            rows.wait()
