"""Ranks that stay up between jobs: many small jobs, one after another, for the price of one launch."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from distbench.launcher.agent import Agent
from distbench.launcher.job import Job, clear_ranks, done_path, next_job_path
from distbench.launcher.nodes.leader import Leader
from distbench.launcher.postmortem import LaunchFailure
from distbench.launcher.supervisor import Tick, concluded, end, no_rank_left
from distbench.launcher.watchdog import Watch
from distbench.report.files import write_atomically
from distbench.utils.signals import Interrupted

_TICK_S = 0.1
_POLL_S = 0.005
_GOODBYE_S = 5.0


class StandingRanks:
    """Runs jobs as `supervise` does, on the ranks of the last job where they are alive and fit the next one.

    Lost ranks are restarted with the next job; so are all ranks where it needs more of them, or devices.
    """

    def __init__(self) -> None:
        self.launches = 0
        self._first: Job | None = None
        self._agent: Agent | None = None
        self._number = 0

    def run(self, job: Job, tick: Tick, signals: Sequence[int], leader: Leader | None = None) -> LaunchFailure | None:
        """See `supervise`; here all ranks are on this node.

        Raises:
            Interrupted, ResultsLost, LaunchFailed, DiskFull: as there.

        """
        if leader is not None:
            message = "ranks stay up on one node only"
            raise ValueError(message)
        job = msgspec.structs.replace(job, stays=True)
        agent = self._hand_over(job)
        watch = Watch(job, agent)
        finished = done_path(Path(job.out), self._number)
        since = 0.0
        with no_rank_left(agent, watch):
            while agent.is_alive():
                if finished.exists():
                    return None
                agent.join(_POLL_S)
                if time.monotonic() - since < _TICK_S:
                    continue
                since = time.monotonic()
                tick(watch.current, watch.slowest)
                if signals:
                    raise Interrupted(signals[0])
                watch.look()
        self._agent = None
        return concluded(job, agent, watch)

    def close(self) -> None:
        """End the ranks."""
        agent, first, self._agent = self._agent, self._first, None
        if agent is None or first is None:
            return
        self._write(msgspec.structs.replace(first, entries=(), stays=False))
        agent.join(_GOODBYE_S)
        end(agent, Watch(first, agent))

    def _hand_over(self, job: Job) -> Agent:
        """Hand `job` to the live ranks, or to new ones."""
        if self._agent is not None and self._first is not None and self._agent.is_alive() and _fits(self._first, job):
            self._write(job)
            return self._agent
        self.close()
        clear_ranks(Path(job.out))
        self.launches += 1
        self._number, self._first, self._agent = 0, job, Agent(job)
        self._agent.start()
        return self._agent

    def _write(self, job: Job) -> None:
        self._number += 1
        write_atomically(next_job_path(Path(job.out), self._number), msgspec.json.encode(job))


def _fits(first: Job, job: Job) -> bool:
    """Whether ranks started for one job can run another: enough of them, devices, and no longer time limits."""
    enough = job.num_ranks <= first.num_ranks and job.out == first.out
    devices = job.accelerated <= first.accelerated and job.shares_devices <= first.shares_devices
    return enough and devices and job.longest_stage_s <= first.longest_stage_s
