"""Bandwidth of dispatch and combine, from the bytes and times in a report (docs/timing.md)."""

from __future__ import annotations

from typing import NamedTuple

from distbench.report.schema import Report

_BYTES = 1e9
_MICROSECONDS = 1e6
_THREE_DIGITS = 999.5


class Bandwidth(NamedTuple):
    """GB/s (10^9 bytes) of a stage.

    `algorithm`: bytes that the fullest rank receives in dispatch, and sends back in combine, its own rows included, per
    median of the slowest rank. `bus`: those of them that come from, or go to, other ranks; None where the report does
    not say who sent them.
    """

    algorithm: float
    bus: float | None

    def cells(self) -> tuple[str, str]:
        """Both as text."""
        return shown(self.algorithm), shown(self.bus)


def bandwidth_of(report: Report, stage: str, median_us: float | None) -> Bandwidth | None:
    """Bandwidth of a stage that moves rows between ranks; None for any other, or one without a time."""
    moved = report.method.get(f"{stage}_bytes")
    if not isinstance(moved, int) or not median_us:
        return None
    algorithm: float = moved / _BYTES / (median_us / _MICROSECONDS)
    share = _share_of_others(report)
    return Bandwidth(algorithm, None if share is None else algorithm * share)


def shown(value: float | None) -> str:
    """A bandwidth with three digits; `-` for none."""
    if value is None:
        return "-"
    return f"{value:.3g}" if value < _THREE_DIGITS else f"{value:.0f}"


def _share_of_others(report: Report) -> float | None:
    """Share of the rows that the fullest rank receives from other ranks."""
    if report.sent is None or report.sent.ranks_per_block != 1:
        return None
    if any(len(row) != len(report.sent.rows) for row in report.sent.rows):  # a stranger's report
        return None
    received = [sum(column) for column in zip(*report.sent.rows, strict=True)]
    fullest = max(range(len(received)), key=received.__getitem__, default=None)
    if fullest is None or not received[fullest]:
        return None
    own: int = report.sent.rows[fullest][fullest]
    share: float = 1 - own / received[fullest]
    return share
