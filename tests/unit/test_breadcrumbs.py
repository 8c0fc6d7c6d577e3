"""Breadcrumbs outlive their rank and cost next to nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
import timeit
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from distbench import breadcrumbs
from distbench.breadcrumbs import Breadcrumbs, read_position
from distbench.process import pid_space
from distbench.waits import KINDS


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
    assert read_position(path) == msgspec.structs.replace(position, waiting=KINDS.index("end of the launch"))


def test_a_process_id_of_another_host_says_nothing_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rank.crumbs"
    with closing(Breadcrumbs(path)) as crumbs:
        crumbs.mark("combine")
        here = read_position(path)
        monkeypatch.setattr(breadcrumbs, "pid_space", lambda: pid_space() + 1)
        elsewhere = read_position(path)
    assert here is not None
    assert here.pid == os.getpid()
    assert elsewhere == msgspec.structs.replace(here, pid=0)


def test_process_ids_are_told_apart_by_host(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {pid_space.__wrapped__()}
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert pid_space.__wrapped__() not in found
    assert pid_space.__wrapped__() == pid_space.__wrapped__()


def test_a_mark_takes_a_microsecond_or_two(tmp_path: Path) -> None:
    with closing(Breadcrumbs(tmp_path / "rank.crumbs")) as crumbs:
        assert min(timeit.repeat(lambda: crumbs.mark("dispatch"), number=200, repeat=100)) / 200 < 3e-6


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
