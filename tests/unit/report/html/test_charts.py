"""Geometry of the pictures: every cell once, nothing outside, labels apart."""

from __future__ import annotations

import math
import re
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from distbench.report.html.charts import (
    WIDTH,
    Estimate,
    Series,
    bar_pairs,
    bars,
    microseconds,
    rows_over_change,
    rows_over_ratio,
    rows_over_time,
    spread,
    strips,
    thinned,
    ticks_of,
)

TIMES = st.lists(st.floats(0, 1e9), max_size=80)


@given(received=st.lists(st.integers(0, 10**6), min_size=1, max_size=300), limit=st.none() | st.integers(1, 10**6))
def test_bars_and_labels_are_inside_the_drawing_and_labels_apart(received: list[int], limit: int | None) -> None:
    lines = {"fullest": max(received), "proven bound": 2 * max(received)} | ({"limit": limit} if limit else {})
    found = bars(received, limit, lines)
    above = sum(rows > limit for rows in received) if limit else 0
    assert (found.within.count("M"), found.above.count("M")) == (len(received) - above, above)
    for x, tall in re.findall(r"M([\d.]+) [\d.]+v-([\d.]+)", found.within + found.above):
        assert 0 <= float(x) <= found.right < WIDTH
        assert 0 <= float(tall) <= found.bottom
    places = [mark.label_at for mark in found.marks]
    assert all(later - earlier >= 11.9 for earlier, later in pairwise(places))
    assert all(10 <= place <= found.height for place in places)
    assert all(0 <= mark.at <= found.bottom for mark in found.marks)


@given(st.lists(TIMES, max_size=12))
def test_rows_over_time_stay_inside_and_do_not_touch(samples: list[list[float]]) -> None:
    found = rows_over_time([Series(str(index), values) for index, values in enumerate(samples)])
    for row in found.rows:
        assert all(0 <= x <= WIDTH for x in row.dots)
        assert len(row.dots) == min(len(samples[int(row.label)]), 60)
        assert row.label_y + 4 < row.y < found.height - 14
    assert all(later.label_y - earlier.y > 10 for earlier, later in pairwise(found.rows))
    assert all(0 <= tick.x <= WIDTH for tick in found.ticks)


def test_rows_over_ratio_hold_the_ideal_and_the_allowed_range() -> None:
    found = rows_over_ratio([Series("one", (0.98, 1.02), (0.9, 1.1)), Series("NaN", (), (0.8, 1.3), alarm=True)])
    assert [tick.label for tick in found.ticks] == ["0.8", "ideal", "1.3"]
    assert found.rows[1].band == (found.ticks[0].x, found.ticks[2].x)
    low, high = found.rows[0].band or (0, 0)
    assert low < found.rows[0].low < found.ticks[1].x < found.rows[0].high < high


def test_labels_that_would_touch_are_left_out_or_moved() -> None:
    assert spread([1, 2, 40], 12) == [12, 24, 40]
    assert [tick.label for tick in ticks_of([(0, "a"), (10, "b"), (31, "c")])] == ["a", "", "c"]


def test_thinned_samples_keep_the_smallest_and_the_largest() -> None:
    found = thinned([float(value) for value in reversed(range(1000))])
    assert (len(found), found[0], found[-1]) == (60, 0.0, 999.0)


@pytest.mark.parametrize(("value", "text"), [(0.5, "0.5 µs"), (1234, "1.23 ms"), (5.6e6, "5.6 s")])
def test_times_have_three_digits_and_a_unit(value: float, text: str) -> None:
    assert microseconds(value) == text


def test_strips_place_tokens_by_number() -> None:
    first, other = strips({2: [0]}, {1: [9, 9], 2: [4]}, 10)
    assert (first.label, first.lost, first.damaged) == ("rank 1", [], [WIDTH - 6])
    assert (other.label, other.lost, len(other.damaged)) == ("rank 2", [6], 1)


SHARES = st.floats(-0.999, 200)


@given(st.lists(st.tuples(SHARES, SHARES, SHARES), max_size=12))
def test_changes_stay_inside_an_axis_that_holds_no_change(changes: list[tuple[float, float, float]]) -> None:
    series = [Series(str(one), (one[1],), (0.0, abs(one[2])), span=(min(one), max(one))) for one in changes]
    found = rows_over_change(series)
    assert all(0 <= x <= WIDTH for row in found.rows for x in (*row.dots, row.low, row.high, *(row.band or ())))
    assert all(row.low <= row.high for row in found.rows)
    labels = [tick.label for tick in found.ticks]
    assert "no change" in labels
    assert labels == sorted(labels, key=lambda label: 0 if label == "no change" else int(label.split(" ")[0]))
    shown = [tick.x for tick in found.ticks if tick.label]
    assert all(later - earlier >= 30 for earlier, later in pairwise(shown))


def test_axis_of_changes_is_even_in_ratios() -> None:
    half, _, double = (row.dots[0] for row in rows_over_change([Series("", (x,)) for x in (-0.5, 0.0, 1.0)]).rows)
    assert half == 6.0
    assert double == WIDTH - 6.0


@given(st.lists(st.tuples(st.floats(0, 1e7) | st.just(math.inf), st.floats(0, 1e6)), max_size=8))
@example([(5e-324, 0.0)])
def test_bars_of_pairs_start_at_zero_and_stay_inside(values: list[tuple[float, float]]) -> None:
    found = bar_pairs([("x" * 99, "new", Estimate(*one), Estimate(*one)) for one in values])
    for pair in found.pairs:
        assert len(pair.label) <= 58
        for bar in (pair.old, pair.new):
            assert 6 <= bar.low <= bar.to <= bar.high <= WIDTH
            assert bar.y + found.thickness < found.height - 14
        assert pair.label_y < pair.old.y
        assert pair.old.y + found.thickness < pair.new.y
    assert found.ticks[0] == (6.0, "0 µs")
    assert 2 <= len(found.ticks) <= 6
