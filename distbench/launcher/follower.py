"""A node other than node 0: it starts its ranks on node 0's order, and reports their state."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec

from distbench.distributed.heartbeat import Position
from distbench.errors import Busy, InvalidCase, Unsupported
from distbench.launcher.agent import Agent
from distbench.launcher.hang import dump_stacks
from distbench.launcher.job import Job, NodeLayout, RankFailure, clear_ranks, failure_path
from distbench.launcher.locks import hold
from distbench.launcher.nodes.client import Client, NodeLost
from distbench.launcher.nodes.interfaces import check_interfaces
from distbench.launcher.nodes.protocol import BEAT_S, Beat, Order, Phase
from distbench.launcher.postmortem import machines, positions
from distbench.launcher.preflight import check_devices
from distbench.launcher.supervisor import end
from distbench.launcher.unused_variables import note_of_launch
from distbench.launcher.watchdog import Watch, first_exit
from distbench.report.progress import Meter
from distbench.report.terminal import print_note
from distbench.utils.signals import Interrupted, collect_signals


class Timeouts(NamedTuple):
    """Seconds that a node waits for node 0, and for another bench to release devices."""

    join_s: float
    lock_s: float


def follow(layout: NodeLayout, secret: bytes, out: Path, timeouts: Timeouts) -> int:
    """Take part until node 0 ends the campaign; return the exit code that node 0 sends.

    `secret` is the launch's. Files of the ranks go below `out`, which no other node may use. Devices are held from the
    first launch on.

    Raises:
        NodeLost: node 0 did not appear, or has disappeared; no rank is left here.
        InvalidCase: node 0 refuses this node or has another secret, or NCCL is configured to use a missing interface.
        Busy: another bench holds this node's devices, and did not release them within `timeouts.lock_s`.
        Unsupported: this node has fewer devices than ranks.
        Interrupted: a signal arrived; no rank is left here.

    """
    with collect_signals() as signals, contextlib.ExitStack() as held:
        client = Client(layout, secret, timeouts.join_s, signals)
        held.callback(client.close)
        meter = held.enter_context(Meter(f"node {layout.node}: waiting for the next launch"))
        follower = _Follower(layout, out, client, signals, _Devices(held, timeouts.lock_s), meter)
        try:
            return follower.run()
        except (Busy, InvalidCase, Unsupported) as error:
            follower.refuse(str(error))
            raise


class _Devices:
    """The devices of this node, held for all launches once the first job names them."""

    def __init__(self, held: contextlib.ExitStack, timeout_s: float) -> None:
        self._held = held
        self._timeout_s = timeout_s
        self._asked_at: float | None = None
        self._taken = False

    def take(self, job: Job) -> bool:
        """Whether this bench now holds the devices; call again while it does not.

        Raises:
            Busy: another bench holds one of them, and has not released it in time.
            Unsupported: this node has fewer devices than ranks.
            InvalidCase: NCCL is configured to use missing interfaces.

        """
        now = time.monotonic()
        self._asked_at = now if self._asked_at is None else self._asked_at
        try:
            if not self._taken:
                cases = [entry.case for entry in job.entries if not entry.refused]
                names = check_devices(cases, job.num_ranks // job.layout.nodes) if job.layout else ()
                check_interfaces(accelerated=bool(names))
                self._held.enter_context(hold(None, names, 0.0))
                self._taken = True
        except Busy:
            if now - self._asked_at >= self._timeout_s:
                raise
        return self._taken


class _Follower:
    def __init__(  # noqa: PLR0913 - a node, its connection, its devices, and its line
        self,
        layout: NodeLayout,
        out: Path,
        client: Client,
        signals: Sequence[int],
        devices: _Devices,
        meter: Meter,
    ) -> None:
        self._out = out
        self._meter = meter
        self._devices = devices
        self._layout = layout
        self._client = client
        self._signals = signals
        self._said = False
        self._beat = Beat(node=layout.node, nodes=layout.nodes, nproc=layout.nproc, host=socket.gethostname())

    def run(self) -> int:
        while True:
            order = self._tell()
            if order.job is not None and self._devices.take(order.job):
                order = self._launch(self._mine(order.job)) or order
            elif order.phase is not Phase.END:
                time.sleep(BEAT_S)
            if order.phase is Phase.END:
                return order.exit_code

    def refuse(self, why: str) -> None:
        """Send node 0 the reason why this node takes no part in the campaign."""
        self._beat.refused = why
        with contextlib.suppress(NodeLost, InvalidCase):
            self._client.tell(self._beat)

    def _mine(self, job: Job) -> Job:
        layout = job.layout or self._layout
        mine = msgspec.structs.replace(layout, node=self._layout.node, host=self._layout.host)
        return msgspec.structs.replace(job, out=str(self._out), layout=mine)

    def _say_unused(self, job: Job) -> None:
        """Print once which variables of this node have no effect: node 0's reports contain its own."""
        note = "" if self._said else note_of_launch(os.environ, job.entries)
        self._said = True
        if note:
            print_note(f"node {self._layout.node}: {note}")

    def _launch(self, job: Job) -> Order | None:
        """Run the ranks of this node; return the order that ended them, if any: node 0 sends END only once."""
        self._say_unused(job)
        clear_ranks(self._out)
        launch = job.layout.launch if job.layout else 0
        self._beat = msgspec.structs.replace(
            self._beat, launch=launch, ended=False, exit=None, heartbeat={}, failures=[], stacks={}, machines={}
        )
        agent = Agent(job)
        watch = Watch(job, agent)
        agent.start()
        self._meter.what = f"node {self._layout.node}: launch {launch}"
        try:
            order = self._watch(job, agent, watch)
        finally:
            end(agent, watch)
        self._meter.what, self._meter.now = f"node {self._layout.node}: waiting for the next launch", ""
        self._note(job)
        self._beat.ended = True
        self._beat.exit = None if agent.finished else first_exit(agent, watch)
        return order

    def _watch(self, job: Job, agent: Agent, watch: Watch) -> Order | None:
        while agent.is_alive():
            agent.join(BEAT_S)
            watch.look()
            self._meter.now = watch.slowest.place if watch.slowest else "ranks start"
            self._note(job)
            order = self._tell()
            if order.phase is not Phase.RUN:
                return order
            if order.want_stacks and not self._beat.stacks:
                self._beat.stacks = dump_stacks(job, positions(job))
        return None

    def _tell(self) -> Order:
        if self._signals:
            raise Interrupted(self._signals[0])
        return self._client.tell(self._beat)

    def _note(self, job: Job) -> None:
        now = time.monotonic_ns()
        self._beat.heartbeat = {rank: _aged(at, now) for rank, at in positions(job).items()}
        self._beat.machines = machines(self._out, job.num_ranks)
        self._beat.failures = [failure for rank in self._beat.heartbeat if (failure := self._failure(rank, now))]

    def _failure(self, rank: int, now: int) -> RankFailure | None:
        try:
            failure = msgspec.json.decode(failure_path(self._out, rank).read_bytes(), type=RankFailure)
        except (OSError, msgspec.DecodeError):
            return None
        return msgspec.structs.replace(failure, position=_aged(failure.position, now))


def _aged(at: Position, now: int) -> Position:
    """A position with its age in nanoseconds, 0 where the rank has moved since `now`."""
    return msgspec.structs.replace(at, since_ns=max(now - at.since_ns, 0), pid=0)
