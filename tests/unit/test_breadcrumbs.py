"""Breadcrumbs outlive their rank and cost next to nothing."""

from __future__ import annotations

import subprocess
import sys
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


_WRITER = """
import pathlib, sys
from distbench.breadcrumbs import Breadcrumbs
crumbs = Breadcrumbs(pathlib.Path(sys.argv[1]))
while True:
    crumbs.mark("combine")
"""


def test_a_reader_never_sees_a_half_written_record(tmp_path: Path) -> None:
    path = tmp_path / "rank.crumbs"
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], cwd=Path(__file__).parents[2]) as writer:
        try:
            deadline = time.monotonic() + 20
            while read_position(path) is None and time.monotonic() < deadline:
                time.sleep(0.01)
            found = [read_position(path) for _ in range(20_000)]
        finally:
            writer.kill()
    assert {position.pid if position else None for position in found} == {writer.pid}
