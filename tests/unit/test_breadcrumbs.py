"""Breadcrumbs outlive their rank and cost next to nothing."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path

from distbench.breadcrumbs import Breadcrumbs, read_position


def test_the_last_position_is_read_from_the_file(tmp_path: Path) -> None:
    path = tmp_path / "rank.crumbs"
    assert read_position(path) is None
    with closing(Breadcrumbs(path)) as crumbs:
        crumbs.case_index, crumbs.arm = 7, "truncated"
        before = time.monotonic_ns()
        crumbs.mark("combine")
        position = read_position(path)
        assert position == crumbs.position()
    assert position is not None
    assert (position.case_index, position.place) == (7, "truncated/combine")
    assert before <= position.since_ns <= time.monotonic_ns()
    assert read_position(path) == position


def test_a_mark_takes_microseconds() -> None:
    crumbs = Breadcrumbs(None)
    start = time.perf_counter()
    for _ in range(10_000):
        crumbs.mark("dispatch")
    assert (time.perf_counter() - start) / 10_000 < 20e-6
