"""The process that starts the ranks and watches them: torchrun's own agent, over ranks forked from one interpreter.

torchrun starts every rank as a new interpreter, and each imports torch for itself. Here the agent's start method is
`forkserver`: one process imports torch once, and the ranks are forked from it. The agent runs in a thread; the main
thread reads the ranks' heartbeats, and handles signals.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from distbench.case.entry import Entry
from distbench.distributed.heartbeat import Position
from distbench.errors import LaunchFailed, OutOfTime
from distbench.launcher.agent import Agent
from distbench.launcher.job import Job, clear_ranks
from distbench.launcher.nodes.leader import Leader
from distbench.launcher.postmortem import LaunchFailure, explain_fault
from distbench.launcher.watchdog import INTERRUPT_GRACE_S, Watch, first_exit, with_hosts
from distbench.utils.signals import Interrupted

_TICK_S = 0.1

Tick = Callable[[Entry | None, Position | None], None]
"""Takes the case under way, and the position of the rank furthest behind."""


def supervise(job: Job, tick: Tick, signals: Sequence[int], leader: Leader | None = None) -> LaunchFailure | None:
    """Run `job` until all its ranks have ended; None if they finished, else the reason.

    `tick` is called about ten times a second. `signals` is the list that `collect_signals`
    yields. `leader` holds the other nodes.

    Raises:
        Interrupted: one of ENDING_SIGNALS. No rank is left, as after any exception.
        ResultsLost: the ranks' files were removed.
        NodesMissing: not all nodes joined.
        LaunchFailed: no rank could be started, or a node cannot take part.
        OutOfTime: the job's deadline has passed; no rank is left.
        DiskFull: a rank had no room for its results.

    """
    clear_ranks(Path(job.out))
    if leader is not None:
        job = leader.begin(job, signals)
    agent = Agent(job)
    agent.store = None if leader is None else leader.store
    watch = Watch(job, agent, leader)
    agent.start()
    with no_rank_left(agent, watch):
        while agent.is_alive() and not watch.given_up:
            agent.join(_TICK_S)
            tick(watch.current, watch.slowest)
            if signals or (leader is not None and leader.refused):
                raise Interrupted(signals[0]) if signals else LaunchFailed(leader.refused if leader else "")
            if job.deadline is not None and job.deadline.left_s < 0:
                raise OutOfTime(job.deadline.source)
            watch.look()
    if leader is not None:
        end(agent, watch)
        leader.stop()
        leader.mirror(job)
    return concluded(job, agent, watch, leader)


@contextlib.contextmanager
def no_rank_left(agent: Agent, watch: Watch) -> Iterator[None]:
    """End the ranks when an exception leaves the context."""
    try:
        yield
    except BaseException:
        end(agent, watch)
        raise


def concluded(job: Job, agent: Agent, watch: Watch, leader: Leader | None = None) -> LaunchFailure | None:
    """Why an agent has ended; None if its ranks finished.

    Raises:
        LaunchFailed, DiskFull: see `supervise`.

    """
    if watch.ending is not None:
        return watch.ending
    if agent.failure:
        watch.kill()
        raise LaunchFailed(agent.failure)
    if agent.finished and watch.elsewhere is None:
        return None
    ending = explain_fault(job, first_exit(agent, watch))
    return ending if leader is None else with_hosts(ending, leader)


def end(agent: Agent, watch: Watch) -> None:
    """Kill the ranks, including those that are still starting."""
    deadline = time.monotonic() + INTERRUPT_GRACE_S
    while agent.is_alive() and time.monotonic() < deadline:
        watch.kill()
        agent.join(_TICK_S)
