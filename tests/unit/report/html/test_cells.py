"""Maps of cells: every cell once, at its shade."""

from __future__ import annotations

import re

from hypothesis import given
from hypothesis import strategies as st

from distbench.report.html.cells import LEVELS, cell_map, heat_map, level_of
from distbench.report.html.charts import WIDTH

TABLES = st.integers(1, 9).flatmap(
    lambda size: st.lists(st.lists(st.integers(0, 9), min_size=size, max_size=size), min_size=size, max_size=size)
)


@given(rows=TABLES)
def test_heat_map_has_every_cell_once_at_its_level(rows: list[list[int]]) -> None:
    found = heat_map(rows)
    cells = [
        (int(x) + step, int(y), level)
        for level, path in found.paths.items()
        for x, y, width in re.findall(r"M(\d+) (\d+)h(\d+)v1h-\d+z", path)
        for step in range(int(width))
    ]
    wanted = [
        (x, y, level_of(value, found.low, found.high)) for y, row in enumerate(rows) for x, value in enumerate(row)
    ]
    assert sorted(cells) == sorted(wanted)


def test_levels_rise_from_the_fewest_to_the_most_rows_and_none_is_apart() -> None:
    assert [level_of(value, 3, 10) for value in (0, 3, 4, 10)] == [0, 1, 2, LEVELS]
    assert level_of(5, 5, 5) == LEVELS


DIGITS = st.integers(1, 32).flatmap(
    lambda tall: st.lists(st.text("012345678", min_size=tall, max_size=tall), min_size=1, max_size=64)
)


def test_map_without_cells_is_empty() -> None:
    assert (cell_map([], {}).paths, cell_map(["", ""], {}).paths) == ({}, {})


@given(DIGITS)
def test_cell_map_covers_its_marked_cells_inside_the_drawing(columns: list[str]) -> None:
    wide, tall = len(columns), len(columns[0])
    found = cell_map(columns, {"rank 0": 0.0, "rank 1": 0.5})
    assert 0 not in found.paths
    area = 0.0
    for path in found.paths.values():
        for corner in re.findall(r"M([\d.]+) ([\d.]+)H([\d.]+)V([\d.]+)H", path):
            left, top, right, low = map(float, corner)
            assert 0 <= left < right <= found.right < WIDTH
            assert 0 <= top < low <= found.bottom < found.height
            area += (right - left) * (low - top)
    marked = sum(cell != "0" for cells in columns for cell in cells)
    assert abs(area / (found.right * found.bottom) - marked / (wide * tall)) < 0.03
    assert [tick.label for tick in found.ticks] == ["rank 0", "rank 1"]
