"""CSV: one row for each case in each night."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Iterator
from typing import Any, BinaryIO

from distbench.case.stages import LAYER_STAGES, OWN_ARMS
from distbench.report.export.table import cell
from distbench.tools.trend.trend import Trend

_TIMES = tuple((arm, stage) for arm in OWN_ARMS for stage in LAYER_STAGES)
COLUMNS = (
    *("night", "path", "ended", "suite", "name", "hash", "verdict", "expect", "as_expected", "change", "bad_since"),
    "reason",
    *(f"{arm}_{stage}_median_us" for arm, stage in _TIMES),
)


def write(trend: Trend, file: BinaryIO) -> None:
    """Write the header and the rows by night; a case that a night lacks has a row only where that is a change."""
    text = io.TextIOWrapper(file, encoding="utf-8", errors="replace", newline="")
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for row in _rows(trend):
        table.writerow(cell(value) for value in row)
    text.flush()
    text.detach()


def _rows(trend: Trend) -> Iterator[list[Any]]:
    changed = {(change.night, id(case)): change.kind for case, change in trend.changes()}
    since = {id(case): case.bad_since for case in trend.cases}
    medians = [trend.times.of_case(key, len(trend.cases)) for key in _TIMES]
    for number, night in enumerate(trend.nights):
        for place, case in enumerate(trend.cases):
            ending, change = case.endings[number], changed.get((number, id(case)), "")
            if ending is None and not change:
                continue
            how = (None, None, None) if ending is None else (ending.verdict.value, ending.expect, ending.as_expected)
            first = since[id(case)]
            bad_since = trend.nights[first].name if first is not None else None
            reason = ending.reason if ending is not None else None
            laps = [float(table[number, place]) for table in medians]
            whose = (night.name, night.path, night.ended, case.suite, case.name, case.hash)
            yield [*whose, *how, change, bad_since, reason, *(None if math.isnan(lap) else lap for lap in laps)]
