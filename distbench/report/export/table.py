"""CSV: one row per case."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from typing import Any, BinaryIO

from distbench.case.stages import LAYER_STAGES, OWN_ARMS, Arm
from distbench.report.results import Result, Results

_CASE_KEYS = (
    "model",
    "ep_size",
    "routing",
    "limit",
    "policy",
    "dispatch_dtype",
    "numerics",
    "transport",
    "experts",
    "seed",
    "repeats",
    "hash",
)
_TIMES = tuple((arm, stage) for arm in OWN_ARMS for stage in LAYER_STAGES)
COLUMNS = (
    "name",
    "verdict",
    "exit_code",
    "expect",
    "as_expected",
    "emulated",
    *_CASE_KEYS,
    "limit_rows",
    "max_recv",
    "lost_rows",
    "hosts",
    "reason_code",
    "reason",
    "wall_s",
    *(f"{arm}_{stage}_median_us" for arm, stage in _TIMES),
    # New columns go to the end: a reader may count positions.
    "limit_proof",
    "limit_bound",
    "limit_formula",
    "suite",
    "ended",
    "timed_arms",
)
# A spreadsheet treats a cell that begins with one of these as a formula, and may run it.
_FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")


def write(results: Results, file: BinaryIO) -> None:
    """Write the header and a row for each result; an empty cell is a value that does not exist."""
    text = io.TextIOWrapper(file, encoding="utf-8", newline="")
    table = csv.writer(text)
    table.writerow(COLUMNS)
    for result in results:
        table.writerow(cell(value) for value in _row(result))
    text.flush()
    text.detach()


def _row(result: Result) -> Iterator[Any]:
    yield from (result.name, result.verdict.value, result.exit_code, result.expect, result.as_expected, result.emulated)
    yield from (result.case.get(key) for key in _CASE_KEYS)
    limit = result.limit
    yield from (limit.effective, limit.max_recv) if limit else (None, None)
    reason = result.reasons[0] if result.reasons else None
    yield from (result.lost.rows, " ".join(result.hosts))
    yield from (reason.code, reason.message) if reason else (None, None)
    yield result.wall_s
    times = {(time.arm, time.stage): time.median_us for time in result.stage_times()}
    yield from (times.get(key) for key in _TIMES)
    yield limit.status if limit else None
    yield from (limit.proof.bound, limit.proof.formula) if limit and limit.proof else (None, None)
    yield from (result.suite, result.ended, " ".join(arm for arm in Arm if arm in result.timed_arms))


def cell(value: Any) -> Any:
    """A value as a cell: never a spreadsheet formula, and booleans in lower case."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str) and value.startswith(_FORMULA_STARTS):
        return f"'{value}"
    return value
