"""The page of many cases: a grid by the axes in which they differ, and the details of those that matter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from distbench.errors import Verdict
from distbench.report.html.case_page import GLYPHS, MEANING, kind_of
from distbench.report.results import Result
from distbench.utils.text import counted

ALL_DETAILED = 200
"""Most cases that all have their details on the page; of more, those do that did not end as expected."""

_MOST_ROWS, _MOST_COLUMNS = 24, 12
_MOST_CHARACTERS, _MOST_OF_A_NAME, _MOST_OF_A_REASON = 40, 120, 300
_LEAST_VALUES = 2


class Cell(NamedTuple):
    """One case in the grid: its number on the page, name, verdict, colour, and whether it has details."""

    number: int
    name: str
    verdict: Verdict
    glyph: str
    kind: str
    expect: str
    reason: str
    values: Mapping[str, str]
    detailed: bool


class Grid(NamedTuple):
    """Cases by two keys, empty where they do not differ: the keys, the columns' values, the rows."""

    row_key: str
    column_key: str
    columns: list[str]
    rows: list[tuple[str, list[list[Cell]]]]


class SuitePage(NamedTuple):
    """Content of the page of a suite."""

    title: str
    kind: str
    headline: str
    counts: list[tuple[str, str, str, int, int]]
    grid: Grid
    unexpected: list[Cell]
    stopped: str


def cell_of(number: int, result: Result, *, detailed: bool) -> Cell:
    """The cell of a result."""
    return Cell(
        number=number,
        name=_short(result.name, _MOST_OF_A_NAME),
        verdict=result.verdict,
        glyph=GLYPHS[result.verdict],
        kind=kind_of(result.verdict, as_expected=result.as_expected),
        expect=result.expect,
        reason=_short(result.reasons[0].message if result.reasons else "", _MOST_OF_A_REASON),
        values={key: _short(value) for key, value in result.case.items() if key != "hash"},
        detailed=detailed,
    )


def suite_page(title: str, cells: Sequence[Cell], missing: int, exit_code: int, stopped: str) -> SuitePage:
    """The page of a suite with `missing` cases that have no result."""
    unexpected = [cell for cell in cells if cell.kind == "bad"]
    counts, surprises = Counter(cell.verdict for cell in cells), Counter(cell.verdict for cell in unexpected)
    planned = len(cells) + missing
    right = len(cells) - len(unexpected)
    lacking = f"; {missing} have no result" if missing else ""
    return SuitePage(
        title=title,
        kind="bad" if exit_code else "good",
        headline=f"{right} of {counted(planned, 'case')} ended as expected{lacking}; exit code {exit_code}",
        counts=[
            (GLYPHS[verdict], verdict.value, MEANING[verdict], counts[verdict], surprises[verdict])
            for verdict in Verdict
            if counts[verdict]
        ],
        grid=grid_of(cells),
        unexpected=unexpected[:ALL_DETAILED],
        stopped=stopped,
    )


def grid_of(cells: Sequence[Cell]) -> Grid:
    """Grid of the cases by the key with most values, and the one that tells most of them apart beside it."""
    row_key, column_key = _axes(cells)
    columns = list(dict.fromkeys(cell.values.get(column_key, "") for cell in cells))
    found: dict[str, list[list[Cell]]] = {}
    for cell in cells:
        row = found.setdefault(cell.values.get(row_key, ""), [[] for _ in columns])
        row[columns.index(cell.values.get(column_key, ""))].append(cell)
    return Grid(row_key, column_key, columns, list(found.items()))


def _axes(cells: Sequence[Cell]) -> tuple[str, str]:
    values: dict[str, set[str]] = {}
    for cell in cells:
        for key, value in cell.values.items():
            values.setdefault(key, set()).add(value)
    sizes = {key: len(found) for key, found in values.items() if len(found) >= _LEAST_VALUES}
    rows = max((key for key in sizes if sizes[key] <= _MOST_ROWS), key=sizes.__getitem__, default="")
    best, pairs = "", sizes.get(rows, 0)
    for key in (key for key in sizes if key != rows and sizes[key] <= _MOST_COLUMNS):
        apart = len({(cell.values.get(rows), cell.values.get(key)) for cell in cells})
        if apart > pairs:
            best, pairs = key, apart
    return rows, best


def _short(value: Any, most: int = _MOST_CHARACTERS) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"
