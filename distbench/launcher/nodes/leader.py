"""Node 0's side of the connections: receives the other nodes' states, and sends orders."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from distbench.distributed.heartbeat import write_position
from distbench.errors import DistbenchError, Verdict
from distbench.launcher.job import Job, NodeLayout, RankFailure, failure_path, heartbeat_path, machine_path
from distbench.launcher.nodes.gate import Gate
from distbench.launcher.nodes.listeners import listen
from distbench.launcher.nodes.proof import Channel, Tampered
from distbench.launcher.nodes.protocol import BEAT_S, MOST_BEAT_BYTES, SILENCE_S, Beat, Order, Phase
from distbench.launcher.nodes.refusals import Refusals
from distbench.launcher.postmortem import Exit
from distbench.report.progress import Meter
from distbench.utils.text import numbers, one_line

_TICK_S = 0.05
_STACKS_S = 4.0
_PARTING_S = 12.0
_TOLD_S = 2.0
_HUNG_UP_S = 2.0


class NodesMissing(DistbenchError):
    """Nodes that should take part did not join. Not a verdict: no case was examined."""

    label = "NODES_MISSING"
    exit_code = 3


class Leader:
    """The nodes of a campaign as node 0 sees them, itself included.

    `refused` holds the reasons of nodes that cannot take part. Peers without the secret never get this far.
    """

    def __init__(self, layout: NodeLayout, join_timeout_s: float, secret: bytes = b"", log: Path | None = None) -> None:
        """Listen on the endpoint of `spread`; all nodes have to join within `join_timeout_s`.

        `log` gets a line for each refused peer.

        Raises:
            InvalidCase: the port is taken, or the endpoint is not on this node.

        """
        self._layout = layout
        self._join_timeout_s = join_timeout_s
        self._order = Order(phase=Phase.WAIT)
        self._job: Job | None = None
        self.store: socket.socket | None = None
        """Rendezvous of the ranks of the current launch."""
        self._lock = threading.Lock()
        self._channels: dict[int, Channel] = {}
        self._beats: dict[int, Beat] = {}
        self._heard: dict[int, float] = {}
        self._mirrored: dict[int, float] = {}
        self._told_end: set[int] = set()
        self._refusals = Refusals(log)
        self.refused = ""
        self._gate = Gate(listen(layout), secret, self._serve, self._refusals)
        self._gate.start()

    def _serve(self, channel: Channel, peer: str) -> None:
        """Answer a node until it disconnects, times out, or sends a message that it may not send."""
        try:
            while True:
                beat = msgspec.json.decode(channel.receive(MOST_BEAT_BYTES), type=Beat)
                order = self._answer(beat, channel)
                channel.send(msgspec.json.encode(order))
                if order.phase is Phase.END and not order.refused:
                    self._told_end.add(beat.node)
        except (OSError, EOFError):
            pass
        except (Tampered, msgspec.DecodeError) as error:
            self._refusals.note(peer, f"knows the secret, but {one_line(error)}")
        finally:
            channel.close()
            self._forget(channel)

    def _answer(self, beat: Beat, channel: Channel) -> Order:
        """Record a beat of another node and return the order for it.

        Raises:
            Tampered: the beat is about ranks that are not its own.

        """
        layout = self._layout
        if (beat.nodes, beat.nproc) != (layout.nodes, layout.nproc) or not 0 < beat.node < layout.nodes:
            text = f"node 0 has {layout.nodes} x {layout.nproc} ranks, node {beat.node} {beat.nodes} x {beat.nproc}"
            return _turned_away(f"{text}; give all nodes the same --nnodes and --nproc")
        if beat.foreign:
            message = f"node {beat.node} {beat.foreign}"
            raise Tampered(message)
        with self._lock:
            away = self._claim(beat, channel)
            if away:
                return _turned_away(away)
            self._beats[beat.node] = beat
            self._heard[beat.node] = time.monotonic()
            if beat.refused and not self.refused:
                self.refused = f"host {beat.host} (node {beat.node}): {beat.refused}"
            order = self._order
            job = self._job if order.phase is Phase.RUN and beat.launch < order.launch else None
        return msgspec.structs.replace(order, job=job)

    def _claim(self, beat: Beat, channel: Channel) -> str:
        """Assign a node number to the first connection that claims it; return the reason to refuse any other one."""
        holder = self._channels.get(beat.node)
        if holder is channel:
            return ""
        if channel in self._channels.values():
            message = "speaks for two nodes"
            raise Tampered(message)
        if holder is not None:
            host = self._beats[beat.node].host
            return f"node {beat.node} is {host} already, {beat.host} claims it too; give each node its own --node-rank"
        if beat.node in self._heard and self._order.phase is not Phase.WAIT:
            return f"node {beat.node} was lost in this launch; start all nodes again"
        self._channels[beat.node] = channel
        return ""

    def _forget(self, channel: Channel) -> None:
        """Record a node that disconnected early: it is lost, unless a signal ends this node as well."""
        with self._lock:
            node = next((node for node, held in self._channels.items() if held is channel), None)
            if node is None:
                return
            del self._channels[node]
            if node not in self._told_end:
                self._heard[node] = time.monotonic() - SILENCE_S + _HUNG_UP_S

    def _gather(self, signals: Sequence[int]) -> None:
        deadline = time.monotonic() + self._join_timeout_s
        with Meter(f"waiting {self._join_timeout_s:.0f} s for nodes", self._layout.nodes) as meter:
            while len(self._beats) < self._layout.nodes - 1 and not signals:
                absent = [node for node in range(1, self._layout.nodes) if node not in self._beats]
                names = numbers(absent)
                if time.monotonic() > deadline:
                    message = f"node {names} did not join within {self._join_timeout_s:.0f} s; see --join-timeout"
                    message += f" ({self.strangers})" if self.strangers else ""
                    raise NodesMissing(message)
                meter.before = meter.done = self._layout.nodes - len(absent)
                meter.also = f"node {names} missing"
                time.sleep(_TICK_S)

    def begin(self, job: Job, signals: Sequence[int]) -> Job:
        """Order a launch of `job` once all nodes have joined, and return the job for node 0 itself.

        Raises:
            NodesMissing: some did not join in time.

        """
        self._gather(signals)
        if self.store is not None:
            self.store.close()
        self.store, *others = listen(self._layout, 0)
        for other in others:
            other.close()
        port = self.store.getsockname()[1]
        layout = msgspec.structs.replace(self._layout, port=port, launch=self._order.launch + 1)
        job = msgspec.structs.replace(job, layout=layout)
        with self._lock:
            self._job = job
            self._mirrored.clear()
            self._order = Order(phase=Phase.RUN, launch=layout.launch)
        return job

    @property
    def strangers(self) -> str:
        """Summary of refused peers; empty for none."""
        return self._refusals.summary()

    def mirror(self, job: Job) -> None:
        """Write the other nodes' rank states into the files where this node's ranks leave theirs."""
        out, now = Path(job.out), time.monotonic_ns()
        for node, beat in self._current().items():
            heard = self._heard[node]
            if self._mirrored.get(node) == heard:
                continue
            self._mirrored[node] = heard
            for rank, at in beat.heartbeat.items():
                write_position(heartbeat_path(out, rank), msgspec.structs.replace(at, since_ns=now - at.since_ns))
            for rank, machine in beat.machines.items():
                machine_path(out, rank).write_bytes(msgspec.json.encode(machine))
            for failure in beat.failures:
                _leave(out, failure, now)

    def first_exit(self) -> Exit | None:
        """Exit of a rank on another node, if there was one."""
        return next((beat.exit for beat in self._current().values() if beat.exit is not None), None)

    def lost(self) -> dict[int, str]:
        """Nodes that have disconnected or no longer answer, with their hosts."""
        silent = time.monotonic() - SILENCE_S
        return {node: self._beats[node].host for node, heard in list(self._heard.items()) if heard < silent}

    def stacks(self) -> dict[int, str]:
        """Request the stacks of the other nodes' ranks, and wait for them briefly."""
        self._say(msgspec.structs.replace(self._order, want_stacks=True))
        deadline = time.monotonic() + _STACKS_S
        while time.monotonic() < deadline and not all(beat.stacks for beat in self._current().values()):
            time.sleep(_TICK_S)
        return {rank: text for beat in self._current().values() for rank, text in beat.stacks.items()}

    def stop(self) -> None:
        """End the launch on all nodes, and wait for its end."""
        self._say(msgspec.structs.replace(self._order, phase=Phase.STOP, want_stacks=False))
        deadline = time.monotonic() + _PARTING_S
        while time.monotonic() < deadline and not all(
            beat.ended for node, beat in self._current().items() if node not in self.lost()
        ):
            time.sleep(_TICK_S)

    def close(self, exit_code: int) -> None:
        """Release the other nodes, with the common exit code."""
        self._say(Order(phase=Phase.END, launch=self._order.launch, exit_code=exit_code))
        deadline = time.monotonic() + _TOLD_S + BEAT_S
        while time.monotonic() < deadline and set(self._beats) - self._told_end - set(self.lost()):
            time.sleep(_TICK_S)
        self._gate.close()
        if self.store is not None:
            self.store.close()

    def place(self, rank: int) -> str:
        """Host of a rank."""
        beat = self._beats.get(rank // self._layout.nproc)
        return socket.gethostname() if beat is None else beat.host

    def ranks_of(self, node: int) -> range:
        """Ranks of a node."""
        return range(node * self._layout.nproc, (node + 1) * self._layout.nproc)

    def _say(self, order: Order) -> None:
        with self._lock:
            self._order = order

    def _current(self) -> dict[int, Beat]:
        """Latest beats of the current launch."""
        with self._lock:
            return {node: beat for node, beat in self._beats.items() if beat.launch == self._order.launch}


def _leave(out: Path, failure: RankFailure, now: int) -> None:
    position = msgspec.structs.replace(failure.position, since_ns=now - failure.position.since_ns)
    content = msgspec.json.encode(msgspec.structs.replace(failure, position=position))
    failure_path(out, failure.rank).write_bytes(content)


def _turned_away(why: str) -> Order:
    return Order(phase=Phase.END, exit_code=Verdict.INVALID.exit_code, refused=why)
