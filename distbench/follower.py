"""A node other than node 0: it starts its ranks when node 0 says so, and tells how they stand."""

from __future__ import annotations

import socket
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from distbench.breadcrumbs import Position
from distbench.hang import dump_stacks
from distbench.job import Job, RankFailure, Spread, failure_path
from distbench.nodes.link import Link
from distbench.nodes.wire import BEAT_S, Beat, Order, Phase
from distbench.postmortem import positions
from distbench.signals import Interrupted, collect_signals
from distbench.supervisor import Agent, Watch, clear, end, first_exit


def follow(spread: Spread, out: Path, join_timeout_s: float) -> int:
    """Take part until node 0 ends the campaign; return the exit code that it gives.

    What the ranks leave goes below `out`, which no other node may use.

    Raises:
        NodeLost: node 0 did not come, or has gone; no rank is left here.
        InvalidCase: node 0 refuses this node.
        Interrupted: a signal came; no rank is left here.

    """
    with collect_signals() as signals:
        link = Link(spread, join_timeout_s, signals)
        try:
            return _Follower(spread, out, link, signals).run()
        finally:
            link.close()


class _Follower:
    def __init__(self, spread: Spread, out: Path, link: Link, signals: Sequence[int]) -> None:
        self._out = out
        self._spread = spread
        self._link = link
        self._signals = signals
        self._beat = Beat(node=spread.node, nodes=spread.nodes, nproc=spread.nproc, host=socket.gethostname())

    def run(self) -> int:
        while True:
            order = self._tell()
            if order.phase is Phase.END:
                return order.exit_code
            if order.job is not None:
                self._launch(self._mine(order.job))
            else:
                time.sleep(BEAT_S)

    def _mine(self, job: Job) -> Job:
        spread = job.spread or self._spread
        mine = msgspec.structs.replace(spread, node=self._spread.node, host=self._spread.host)
        return msgspec.structs.replace(job, out=str(self._out), spread=mine)

    def _launch(self, job: Job) -> None:
        clear(self._out)
        launch = job.spread.launch if job.spread else 0
        self._beat = msgspec.structs.replace(
            self._beat, launch=launch, ended=False, exit=None, crumbs={}, failures=[], stacks={}
        )
        agent, watch = Agent(job), Watch(job)
        agent.start()
        try:
            self._watch(job, agent, watch)
        finally:
            end(agent, watch)
        self._note(job)
        self._beat.ended = True
        self._beat.exit = None if agent.finished else first_exit(agent, watch)

    def _watch(self, job: Job, agent: Agent, watch: Watch) -> None:
        while agent.is_alive():
            agent.join(BEAT_S)
            watch.look()
            self._note(job)
            order = self._tell()
            if order.phase is not Phase.RUN:
                return
            if order.want_stacks and not self._beat.stacks:
                self._beat.stacks = dump_stacks(job, positions(job))

    def _tell(self) -> Order:
        if self._signals:
            raise Interrupted(self._signals[0])
        return self._link.tell(self._beat)

    def _note(self, job: Job) -> None:
        now = time.monotonic_ns()
        self._beat.crumbs = {rank: _aged(at, now) for rank, at in positions(job).items()}
        self._beat.failures = [failure for rank in self._beat.crumbs if (failure := self._failure(rank, now))]

    def _failure(self, rank: int, now: int) -> RankFailure | None:
        try:
            failure = msgspec.json.decode(failure_path(self._out, rank).read_bytes(), type=RankFailure)
        except (OSError, msgspec.DecodeError):
            return None
        return msgspec.structs.replace(failure, position=_aged(failure.position, now))


def _aged(at: Position, now: int) -> Position:
    return msgspec.structs.replace(at, since_ns=now - at.since_ns, pid=0)
