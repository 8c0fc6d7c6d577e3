"""The main thread's view of the ranks: the case in flight, lost ranks, and the processes that it kills."""

from __future__ import annotations

import contextlib
import multiprocessing
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
from torch.distributed.launcher import api

from distbench.case.entry import Entry
from distbench.case.stages import Stage
from distbench.distributed.heartbeat import Heartbeat, Position, write_position
from distbench.errors import LaunchFailed
from distbench.launcher.agent import Agent
from distbench.launcher.job import Job, heartbeat_path, ranks_folder
from distbench.launcher.nodes.leader import Leader
from distbench.launcher.postmortem import positions
from distbench.launcher.supervisor import supervise
from distbench.launcher.watchdog import Watch
from distbench.utils.process import is_alive
from tests.cases import tiny_case
from tests.end_to_end.launches import wait_until


@pytest.fixture
def job(tmp_path: Path) -> Job:
    ranks_folder(tmp_path).mkdir()
    entries = tuple(Entry(name=f"case {seed}", case=tiny_case(2, seed=seed), sources={}) for seed in range(3))
    return Job(entries=entries, out=str(tmp_path), supervised=True)


@contextlib.contextmanager
def forked() -> Iterator[int]:
    """Yield the id of a process in the form of a rank that writes no heartbeat."""
    process = multiprocessing.get_context("forkserver").Process(target=time.sleep, args=(60,))
    process.start()
    assert process.pid is not None
    yield process.pid
    process.kill()
    process.join()


def test_case_in_flight_is_that_of_the_rank_furthest_behind(job: Job) -> None:
    watch = Watch(job, Agent(job))
    watch.look()
    assert watch.current is None
    for rank, case_index in enumerate((2, 1)):
        heartbeat = Heartbeat(heartbeat_path(Path(job.out), rank))
        heartbeat.case_index = case_index
        heartbeat.mark(Stage.AGREE)
        heartbeat.close()
    watch.look()
    assert watch.current is job.entries[1]
    assert watch.ending is None


class OneHostLost:
    """Last heartbeat of node 1, with rank 1, in the first case."""

    def lost(self) -> dict[int, str]:
        return {1: "host1"}

    def ranks_of(self, node: int) -> range:
        return range(node, node + 1)

    def mirror(self, job: Job) -> None:
        """All is there."""

    def first_exit(self) -> None:
        """No rank has ended."""


def test_loss_of_a_host_is_attributed_to_the_case_in_flight_on_this_node(
    job: Job, monkeypatch: pytest.MonkeyPatch
) -> None:
    heartbeat = Heartbeat(heartbeat_path(Path(job.out), 0))
    heartbeat.case_index = 2
    heartbeat.mark(Stage.AGREE)
    heartbeat.close()
    write_position(heartbeat_path(Path(job.out), 1), Position(0, 0, 1, time.monotonic_ns(), 0, 1))
    watch = Watch(job, Agent(job), cast("Leader", OneHostLost()))
    monkeypatch.setattr(watch, "kill", lambda: None)  # rank 0 is this process
    watch.look()
    assert watch.ending is not None
    assert (watch.ending.case_index, watch.ending.last) == (2, True)
    assert "host host1 (node 1, rank 1 to 1) is gone or no longer answers" in watch.ending.reasons[0].message


def test_kill_ends_ranks_without_a_heartbeat_and_no_other_process(job: Job) -> None:
    with forked() as other:
        agent = Agent(job)
        with forked() as mute:
            watch = Watch(job, agent)
            watch.kill()
            assert wait_until(lambda: not is_alive(mute), 10)
        assert is_alive(other)
    assert watch.killed == {0, 1}


def test_agent_that_cannot_start_ranks_fails_the_launch(
    job: Job, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def elastic_launch(*_: Any) -> None:
        raise OSError(24, "Too many open files")

    monkeypatch.setattr(api, "elastic_launch", elastic_launch)
    with pytest.raises(LaunchFailed, match=r"^OSError of torchrun's agent: \[Errno 24\] Too many open files; "):
        supervise(job, lambda *_: None, [])
    assert "Traceback" not in capfd.readouterr().err
    assert positions(job) == {}
