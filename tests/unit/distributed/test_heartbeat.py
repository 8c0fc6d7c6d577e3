"""Heartbeat files: they outlive their rank, and writing takes microseconds."""

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

from distbench.case.stages import Stage
from distbench.distributed.heartbeat import Heartbeat, read_position
from distbench.distributed.waits import KINDS
from distbench.utils.process import pid_space


def test_last_position_of_a_rank_is_read_from_its_file(tmp_path: Path) -> None:
    path = tmp_path / "rank.heartbeat"
    assert read_position(path) is None
    with closing(Heartbeat(path)) as heartbeat:
        heartbeat.case_index, heartbeat.arm = 7, "truncated"
        before = time.monotonic_ns()
        heartbeat.mark(Stage.COMBINE)
        position = read_position(path)
        assert position == heartbeat.position()
    assert position is not None
    assert (position.case_index, position.place) == (7, "truncated/combine")
    assert before <= position.since_ns <= time.monotonic_ns()
    assert read_position(path) == msgspec.structs.replace(position, waiting=KINDS.index("end of the launch"))


def test_rank_that_has_recorded_its_waits_and_no_place_has_no_position(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A supervisor that reads at this moment saw a rank that had stood in start since the machine was booted."""
    path, seen = tmp_path / "rank.heartbeat", []
    mark = Heartbeat.mark

    def look(heartbeat: Heartbeat, stage: Stage) -> None:
        seen.append(read_position(path))
        mark(heartbeat, stage)

    monkeypatch.setattr(Heartbeat, "mark", look)
    with closing(Heartbeat(path)):
        assert seen == [None]
        assert read_position(path) is not None


def test_process_id_of_another_host_is_not_taken_for_a_local_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "rank.heartbeat"
    with closing(Heartbeat(path)) as heartbeat:
        heartbeat.mark(Stage.COMBINE)
        here = read_position(path)
        monkeypatch.setattr("distbench.distributed.heartbeat.pid_space", lambda: pid_space() + 1)
        elsewhere = read_position(path)
    assert here is not None
    assert here.pid == os.getpid()
    assert elsewhere == msgspec.structs.replace(here, pid=0)


def test_process_id_space_differs_between_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    found = {pid_space.__wrapped__()}
    monkeypatch.setattr(socket, "gethostname", lambda: "elsewhere")
    assert pid_space.__wrapped__() not in found
    assert pid_space.__wrapped__() == pid_space.__wrapped__()


def test_marking_a_stage_takes_less_than_three_microseconds(tmp_path: Path) -> None:
    with closing(Heartbeat(tmp_path / "rank.heartbeat")) as heartbeat:
        assert min(timeit.repeat(lambda: heartbeat.mark(Stage.DISPATCH), number=200, repeat=100)) / 200 < 3e-6


_WRITER = """
import pathlib, sys
from distbench.distributed.heartbeat import Heartbeat
heartbeat = Heartbeat(pathlib.Path(sys.argv[1]))
while True:
    heartbeat.mark(Stage.COMBINE)
"""


def test_reader_never_sees_a_partially_written_record(tmp_path: Path) -> None:
    path = tmp_path / "rank.heartbeat"
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], cwd=Path(__file__).parents[3]) as writer:
        try:
            deadline = time.monotonic() + 20
            while read_position(path) is None and time.monotonic() < deadline:
                time.sleep(0.01)
            found = [read_position(path) for _ in range(20_000)]
        finally:
            writer.kill()
    assert {position.pid if position else None for position in found} == {writer.pid}
