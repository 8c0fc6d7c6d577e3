"""The page of a sweep: time and memory against the limit, bucket edges, and the limits that lose rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from distbench.case.stages import Arm
from distbench.report.html import charts
from distbench.report.schema import Report
from distbench.report.sweep import COLUMNS, SweepRow
from distbench.utils.text import counted

_TOP, _HEIGHT, _LEFT, _RIGHT = 10.0, 150.0, 6.0, 354.0
_GIB = 2**30


class Point(NamedTuple):
    """A limit in a plot: its place, and the top of its whisker."""

    x: float
    y: float
    to: float
    label: str


class Plot(NamedTuple):
    """A value against the limit, rows on a logarithmic axis; limits left of `unsafe_to` lose rows."""

    title: str
    height: float
    refused: list[charts.Tick]
    bottom: float
    points: list[Point]
    uncut: float | None
    uncut_label: str
    unsafe_to: float
    edges: list[charts.Tick]
    top_label: str


class SweepPage(NamedTuple):
    """Content of the page of a sweep."""

    headline: str
    kind: str
    fullest: int
    bound: str
    plots: list[Plot]
    columns: Sequence[str]
    rows: list[tuple[str, ...]]
    unsafe: str
    notes: list[str]


def sweep_page(reports: Sequence[tuple[Report, SweepRow]]) -> SweepPage:
    """The page of a sweep's reports with the rows of its table."""
    rows = [row for _, row in reports]
    limits = [report.limit for report, _ in reports if report.limit is not None]
    fullest = max((limit.max_recv for limit in limits), default=0)
    bound = next((str(limit.proof.bound) for limit in limits if limit.proof), "")
    unsafe = [row for row in rows if not row.safe]
    edges = sorted({bucket for report, _ in reports for bucket in _buckets(report)})
    told = f"limits below {counted(fullest, 'row')} lose rows of this batch"
    proven = f"; from {bound} rows on no routing of these token counts loses any" if bound else ""
    times = [(row, row.layer_us, row.layer_p99_us) for row in rows]
    memory = [(row, _gib(row.peak_device_bytes), _gib(row.peak_device_bytes)) for row in rows]
    plots = [
        _plot("time of the layer, median with p99", times, fullest, edges, charts.microseconds),
        _plot("peak memory of the device", memory, fullest, edges, lambda value: f"{value:.3g} GiB"),
    ]
    wrong = [row for report, row in reports if not report.as_expected]
    return SweepPage(
        headline=f"{counted(len(rows), 'limit')}, {len(wrong)} not as expected: {told}{proven}",
        kind="bad" if wrong else "good",
        fullest=fullest,
        bound=bound,
        plots=[plot for plot in plots if plot is not None],
        columns=COLUMNS,
        rows=[row.cells() for row in rows],
        unsafe=", ".join(f"{row.limit} ({row.rows} rows)" for row in unsafe),
        notes=sorted({note for row in rows for note in row.notes}),
    )


def _gib(size: int | None) -> float | None:
    return None if size is None else size / _GIB


def _buckets(report: Report) -> list[int]:
    """Buckets of the cut arm's kernels, which are named by the rows that end them."""
    kernels = (rank.kernels.get(Arm.TRUNCATED) for rank in report.ranks)
    return [kernel["bucket"] for kernel in kernels if kernel and isinstance(kernel.get("bucket"), int)]


def _plot(
    title: str,
    values: Sequence[tuple[SweepRow, float | None, float | None]],
    fullest: int,
    edges: Sequence[int],
    words: Callable[[float], str],
) -> Plot | None:
    """A plot; None where no value is known."""
    known = [(row, middle, top or middle) for row, middle, top in values if middle is not None]
    if not known:
        return None
    rows = [row.rows for row, *_ in values if row.rows] + [fullest or 1]
    low, high = math.log2(max(min(rows), 1)) - 0.2, math.log2(max(rows)) + 0.2
    most = max(top for _, _, top in known) or 1.0
    bottom = _TOP + _HEIGHT

    def across(count: int) -> float:
        return _LEFT + (math.log2(max(count, 1)) - low) / (high - low) * (_RIGHT - _LEFT)

    def up(value: float) -> float:
        return bottom - value / most * _HEIGHT

    points = [
        Point(across(row.rows), up(middle), up(top), f"limit {row.limit}, {counted(row.rows, 'row')}: {words(middle)}")
        for row, middle, top in known
        if row.rows
    ]
    uncut = next((middle for row, middle, _ in known if row.rows is None), None)
    inside = [edge for edge in edges if low <= math.log2(max(edge, 1)) <= high]
    return Plot(
        title=title,
        height=bottom + 18,
        refused=[charts.Tick(across(row.rows), row.limit) for row, middle, _ in values if middle is None and row.rows],
        bottom=bottom,
        points=points,
        uncut=None if uncut is None else up(uncut),
        uncut_label="" if uncut is None else f"without a cut: {words(uncut)}",
        unsafe_to=max(across(fullest), _LEFT) if fullest else _LEFT,
        edges=charts.ticks_of([(across(edge), str(edge)) for edge in inside]),
        top_label=words(most),
    )
