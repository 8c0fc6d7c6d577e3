"""Node 0's side: hears the other nodes, and tells them what to do."""

from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from distbench.breadcrumbs import write_position
from distbench.errors import DistbenchError, InvalidCase
from distbench.job import Job, RankFailure, Spread, crumb_path, failure_path, machine_path
from distbench.nodes.wire import BEAT_S, SILENCE_S, Beat, Order, Phase
from distbench.postmortem import Exit

_TICK_S = 0.05
_STACKS_S = 4.0
_PARTING_S = 12.0
_TOLD_S = 2.0
_HUNG_UP_S = 2.0


class NodesMissing(DistbenchError):
    """Nodes that should take part did not come. Not a verdict: no case was looked at."""

    label = "NODES_MISSING"
    exit_code = 3


class Hub:
    """The nodes of a campaign as node 0 sees them, itself included.

    `refused` says which of them cannot take part, and why.
    """

    def __init__(self, spread: Spread, join_timeout_s: float) -> None:
        """Listen on the port of `spread`; all nodes have to come within `join_timeout_s`.

        Raises:
            InvalidCase: the port is taken.

        """
        self._spread = spread
        self._join_timeout_s = join_timeout_s
        self._order = Order(phase=Phase.WAIT)
        self._job: Job | None = None
        self._lock = threading.Lock()
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}
        self._mirrored: dict[int, float] = {}
        self._told_end: set[int] = set()
        self.refused = ""
        try:
            self._server = _Server(("", spread.port), self)
        except OSError as error:
            message = f"--rdzv-endpoint {spread.endpoint}: {error.strerror or error} on node 0; use another port"
            raise InvalidCase(message) from error
        threading.Thread(target=self._server.serve_forever, name="hub", daemon=True).start()

    def answer(self, beat: Beat) -> Order:
        """Take a beat of another node and return the order for it."""
        spread = self._spread
        if (beat.nodes, beat.nproc) != (spread.nodes, spread.nproc) or not 0 < beat.node < spread.nodes:
            text = f"node 0 has {spread.nodes} x {spread.nproc} ranks, node {beat.node} {beat.nodes} x {beat.nproc}"
            return Order(phase=Phase.END, exit_code=2, refused=f"{text}; give all nodes the same --nnodes and --nproc")
        with self._lock:
            other = self._beats.get(beat.node)
            if other is not None and other.host != beat.host:
                text = f"node {beat.node} is {other.host} already, {beat.host} comes too"
                return Order(phase=Phase.END, exit_code=2, refused=f"{text}; give each node a --node-rank of its own")
            self._beats[beat.node] = beat
            self._heard[beat.node] = time.monotonic()
            if beat.refused and not self.refused:
                self.refused = f"host {beat.host} (node {beat.node}): {beat.refused}"
            order = self._order
            if order.phase is Phase.END:
                self._told_end.add(beat.node)
            job = self._job if order.phase is Phase.RUN and beat.launch < order.launch else None
        return msgspec.structs.replace(order, job=job)

    def forget(self, node: int) -> None:
        """Note that a node has hung up before it was sent home: it is lost, unless a signal ends this one as well."""
        with self._lock:
            if node in self._heard and node not in self._told_end:
                self._heard[node] = time.monotonic() - SILENCE_S + _HUNG_UP_S

    def _gather(self, signals: Sequence[int]) -> None:
        deadline = time.monotonic() + self._join_timeout_s
        while len(self._beats) < self._spread.nodes - 1 and not signals:
            if time.monotonic() > deadline:
                absent = [node for node in range(1, self._spread.nodes) if node not in self._beats]
                names = ", ".join(map(str, absent))
                message = f"node {names} not there after {self._join_timeout_s:.0f} s; see --join-timeout"
                raise NodesMissing(message)
            time.sleep(_TICK_S)

    def begin(self, job: Job, signals: Sequence[int]) -> Job:
        """Order a launch of `job` once all nodes are there, and return it as node 0 itself has to run it.

        Raises:
            NodesMissing: some did not come in time.

        """
        self._gather(signals)
        spread = msgspec.structs.replace(self._spread, port=_free_port(), launch=self._order.launch + 1)
        job = msgspec.structs.replace(job, spread=spread)
        with self._lock:
            self._job = job
            self._mirrored.clear()
            self._order = Order(phase=Phase.RUN, launch=spread.launch)
        return job

    def mirror(self, job: Job) -> None:
        """Write what other nodes told of their ranks to where the ranks of this one leave it."""
        out, now = Path(job.out), time.monotonic_ns()
        for node, beat in self._current().items():
            heard = self._heard[node]
            if self._mirrored.get(node) == heard:
                continue
            self._mirrored[node] = heard
            for rank, at in beat.crumbs.items():
                write_position(crumb_path(out, rank), msgspec.structs.replace(at, since_ns=now - at.since_ns))
            for rank, machine in beat.machines.items():
                machine_path(out, rank).write_bytes(msgspec.json.encode(machine))
            for failure in beat.failures:
                _leave(out, failure, now)

    def first_exit(self) -> Exit | None:
        """Return the exit of a rank on another node, if there was one."""
        return next((beat.exit for beat in self._current().values() if beat.exit is not None), None)

    def lost(self) -> dict[int, str]:
        """Return the nodes that have hung up or no longer answer, and their hosts."""
        silent = time.monotonic() - SILENCE_S
        return {node: self._beats[node].host for node, heard in list(self._heard.items()) if heard < silent}

    def stacks(self) -> dict[int, str]:
        """Ask the other nodes for the stacks of their ranks, and wait for them a little."""
        self._say(msgspec.structs.replace(self._order, want_stacks=True))
        deadline = time.monotonic() + _STACKS_S
        while time.monotonic() < deadline and not all(beat.stacks for beat in self._current().values()):
            time.sleep(_TICK_S)
        return {rank: text for beat in self._current().values() for rank, text in beat.stacks.items()}

    def stop(self) -> None:
        """End the launch on all nodes, and wait until it has."""
        self._say(msgspec.structs.replace(self._order, phase=Phase.STOP, want_stacks=False))
        deadline = time.monotonic() + _PARTING_S
        while time.monotonic() < deadline and not all(
            beat.ended for node, beat in self._current().items() if node not in self.lost()
        ):
            time.sleep(_TICK_S)

    def close(self, exit_code: int) -> None:
        """Send the other nodes home, with the exit code that all end with."""
        self._say(Order(phase=Phase.END, launch=self._order.launch, exit_code=exit_code))
        deadline = time.monotonic() + _TOLD_S + BEAT_S
        while time.monotonic() < deadline and set(self._beats) - self._told_end - set(self.lost()):
            time.sleep(_TICK_S)
        self._server.shutdown()
        self._server.server_close()

    def place(self, rank: int) -> str:
        """Return the host of a rank."""
        beat = self._beats.get(rank // self._spread.nproc)
        return socket.gethostname() if beat is None else beat.host

    def ranks_of(self, node: int) -> range:
        """Return the ranks of a node."""
        return range(node * self._spread.nproc, (node + 1) * self._spread.nproc)

    def _say(self, order: Order) -> None:
        with self._lock:
            self._order = order

    def _current(self) -> dict[int, Beat]:
        """Return the latest beats of the launch under way."""
        with self._lock:
            return {node: beat for node, beat in self._beats.items() if beat.launch == self._order.launch}


def _leave(out: Path, failure: RankFailure, now: int) -> None:
    position = msgspec.structs.replace(failure.position, since_ns=now - failure.position.since_ns)
    content = msgspec.json.encode(msgspec.structs.replace(failure, position=position))
    failure_path(out, failure.rank).write_bytes(content)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


class _Server(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    address_family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    request_queue_size = 1024

    def __init__(self, address: tuple[str, int], hub: Hub) -> None:
        self.hub = hub
        super().__init__(address, _Connection)

    def server_bind(self) -> None:
        """Listen to IPv4 as well, where both go over one socket."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


class _Connection(socketserver.StreamRequestHandler):
    timeout = SILENCE_S

    def handle(self) -> None:
        node = 0
        with contextlib.suppress(OSError, msgspec.DecodeError):
            for line in self._lines():
                beat = msgspec.json.decode(line, type=Beat)
                assert isinstance(self.server, _Server)  # noqa: S101 - tells mypy
                order = self.server.hub.answer(beat)
                node = node if order.refused else beat.node
                self.wfile.write(msgspec.json.encode(order) + b"\n")
        if node and isinstance(self.server, _Server):
            self.server.hub.forget(node)

    def _lines(self) -> Iterator[bytes]:
        while line := self.rfile.readline():
            yield line
