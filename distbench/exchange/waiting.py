"""The wait for rows in flight."""

from __future__ import annotations

from collections.abc import Iterable

from distbench.exchange.base import Underway
from distbench.waits import waiting


def wait_for(travel: Iterable[Underway]) -> None:
    """Wait for the rows; on a device its stream waits, and the host continues."""
    with waiting("rows of peers"):
        for rows in travel:
            rows.wait()
