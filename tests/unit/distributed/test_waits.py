"""Waits of a rank in its heartbeat."""

from __future__ import annotations

import os
import timeit
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from distbench.case.stages import Stage
from distbench.distributed.heartbeat import Heartbeat, Position, read_position, write_position
from distbench.distributed.waits import KINDS, collective, waiting


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rank.heartbeat"


@pytest.fixture
def heartbeat(path: Path) -> Iterator[Heartbeat]:
    with closing(Heartbeat(path)) as opened:
        yield opened


def read(path: Path) -> Position:
    position = read_position(path)
    assert position is not None
    return position


@pytest.mark.usefixtures("heartbeat")
def test_nested_waits_are_recorded_and_cleared(path: Path) -> None:
    assert read(path).waits_for == ""
    with waiting("group creation"):
        with collective("all_gather"):
            assert read(path).waits_for == "all_gather"
        assert read(path).waits_for == "group creation"
    assert read(path).waits_for == ""


@pytest.mark.usefixtures("heartbeat")
def test_wait_is_cleared_by_an_exception(path: Path) -> None:
    with pytest.raises(ValueError, match="x"), waiting("gather"):
        raise ValueError("x")  # noqa: EM101
    assert read(path).waits_for == ""


def test_collectives_are_numbered_per_case_and_recorded_with_their_device(path: Path, heartbeat: Heartbeat) -> None:
    assert read(path).collective == ""
    with collective("all_to_all", 3):
        pass
    assert read(path).collective == "all_to_all (collective 1 of the case on a device)"
    assert read(path).device == 3
    with collective("gather"):
        heartbeat.mark(Stage.GATHER)
        assert read(path).collective == "gather (collective 2 of the case)"
    first = read(path).progress
    heartbeat.case_index = 1
    heartbeat.mark(Stage.START)
    assert read(path).entered == 0
    assert read(path).progress > first


def test_finished_rank_records_that_it_waits_for_the_end_of_the_launch(path: Path) -> None:
    with closing(Heartbeat(path)) as heartbeat:
        heartbeat.mark(Stage.DONE)
    assert read(path).waits_for == "end of the launch"
    with waiting("gather"):
        assert read(path).waits_for == "end of the launch"


def test_position_has_the_repeats_that_have_ended(path: Path) -> None:
    with closing(Heartbeat(path)) as heartbeat:
        heartbeat.repeat = 3
        heartbeat.mark(Stage.CHECK)
        assert read(path).repeat == heartbeat.position().repeat == 3


def test_position_of_another_host_keeps_its_wait(path: Path) -> None:
    position = Position(1, 2, 3, 4, os.getpid(), 6, KINDS.index("barrier"), 8, KINDS.index("gather"), 0, 4, 7)
    write_position(path, position)
    assert read(path) == position


@pytest.mark.parametrize("number", [len(KINDS), -1])
def test_position_record_with_an_unknown_wait_is_ignored(path: Path, number: int) -> None:
    write_position(path, Position(0, 0, 0, 0, 1, 0, number))
    assert read_position(path) is None


@pytest.mark.usefixtures("heartbeat")
def test_recording_a_wait_takes_less_than_three_microseconds() -> None:
    def wait() -> None:
        with collective("gather"):
            pass

    assert min(timeit.repeat(wait, number=200, repeat=100)) / 200 < 3e-6
