"""Maps of cells: rows sent between ranks, nodes and links, differing tokens and columns."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby
from typing import NamedTuple, TypeVar

from markupsafe import Markup

from distbench.report.html.charts import WIDTH, Tick, number, path_of, ticks_of

LEVELS = 8
"""Shades of a heat map; 0 is the shade of nothing."""

_RIGHT, _HEIGHT = 76.0, 128.0
_MOST_TICKS = 64
_Kind = TypeVar("_Kind", bound=Hashable)


class HeatMap(NamedTuple):
    """Paths by level, in cells of 1 x 1; `size` cells a side; the range of rows that the levels share."""

    size: int
    paths: dict[int, Markup]
    low: int
    high: int


def level_of(value: int, low: int, high: int) -> int:
    """Shade of `value`: 0 for none, else 1 to LEVELS between `low` and `high`."""
    if value <= 0:
        return 0
    return LEVELS if high <= low else 1 + (value - low) * (LEVELS - 1) // (high - low)


def bounds_of(rows: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Smallest number of rows above none, and the largest; zeros where there are none."""
    some = [value for row in rows for value in row if value > 0]
    return (min(some), max(some)) if some else (0, 0)


def heat_map(rows: Sequence[Sequence[int]]) -> HeatMap:
    """Heat map of a table; neighbours of one level in a row are one rectangle."""
    low, high = bounds_of(rows)
    paths = cell_paths([[level_of(value, low, high) for value in row] for row in rows])
    return HeatMap(len(rows), {level: paths[level] for level in sorted(paths)}, low, high)


def cell_paths(rows: Sequence[Sequence[_Kind]]) -> dict[_Kind, Markup]:
    """Paths of the cells of each kind, 1 x 1; neighbours of one kind in a row are one rectangle."""
    parts: dict[_Kind, list[str]] = {}
    for y, row in enumerate(rows):
        x = 0
        for kind, alike in groupby(row):
            count = sum(1 for _ in alike)
            parts.setdefault(kind, []).append(f"M{x} {y}h{count}v1h-{count}z")
            x += count
    return {kind: path_of(found) for kind, found in parts.items()}


class CellMap(NamedTuple):
    """Shades of a table with axes: paths by level, size of the map, and places on the horizontal axis."""

    paths: dict[int, Markup]
    right: float
    bottom: float
    height: float
    ticks: list[Tick]


def cell_map(columns: Sequence[str], marks: Mapping[str, float]) -> CellMap:
    """Map of texts of digits, a text a column from top to bottom; `marks` are labels at shares of its width."""
    right = WIDTH - _RIGHT
    wide, tall = right / max(len(columns), 1), _HEIGHT / max([1, *map(len, columns)])
    parts: dict[int, list[str]] = {}
    for x, cells in enumerate(columns):
        y = 0
        for digit, alike in groupby(cells):
            count = sum(1 for _ in alike)
            left, top, low = number(x * wide), number(y * tall), number((y + count) * tall)
            parts.setdefault(min(int(digit), LEVELS), []).append(
                f"M{left} {top}H{number((x + 1) * wide)}V{low}H{left}z"
            )
            y += count
    paths = {level: path_of(parts[level]) for level in sorted(parts) if level}
    ticks = ticks_of([(share * right, label) for label, share in marks.items()])
    shown = [tick for tick in ticks if tick.label or len(ticks) <= _MOST_TICKS]
    return CellMap(paths, right, _HEIGHT, _HEIGHT + 18, shown)
