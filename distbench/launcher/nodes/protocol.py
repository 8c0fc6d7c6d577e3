"""Messages between node 0 and the other nodes: a JSON document each way, about twice a second, over proof.Channel."""

from __future__ import annotations

from enum import Enum

import msgspec

from distbench.distributed import waits
from distbench.distributed.heartbeat import Position
from distbench.launcher.job import Job, Machine, RankFailure
from distbench.launcher.postmortem import Exit

BACKEND = "distbench"
"""The rendezvous of rendezvous.py in torchrun's registry."""
BEAT_S = 0.5
# Silence after which the other side counts as lost.
SILENCE_S = 15.0
# Bounds of messages: a node's stacks, and a job of very many cases.
MOST_BEAT_BYTES = 1 << 24
MOST_ORDER_BYTES = 1 << 28

_MOST_NAME = 255
_MOST_NUMBER = 1 << 62


class Phase(str, Enum):
    """State that node 0 requests of the others."""

    WAIT = "wait"
    RUN = "run"
    STOP = "stop"
    END = "end"


class Beat(msgspec.Struct, kw_only=True):
    """State of a node. In `heartbeat`, `since_ns` is an age, since hosts share no clock, and `pid` is 0.

    `launch` is the last one that the node began, 0 for none. `ended`: its ranks are gone. `exit` is the first of their
    exits, `failures` are their exceptions, `machines` their locations. `refused` is the reason why the node leaves,
    which it then does.
    """

    node: int
    nodes: int
    nproc: int
    host: str
    launch: int = 0
    ended: bool = False
    exit: Exit | None = None
    heartbeat: dict[int, Position] = {}
    failures: list[RankFailure] = []
    machines: dict[int, Machine] = {}
    stacks: dict[int, str] = {}
    refused: str = ""

    @property
    def foreign(self) -> str:
        """Complaint about ranks of other nodes, or an impossible host or place; empty for a valid beat."""
        own = range(self.node * self.nproc, (self.node + 1) * self.nproc)
        told = {*self.heartbeat, *self.machines, *self.stacks, *(failure.rank for failure in self.failures)}
        told |= set() if self.exit is None else {self.exit.rank}
        others = sorted(rank for rank in told if rank not in own)
        if others:
            return f"reports rank {others[0]}, which is not on it"
        if len(self.host) > _MOST_NAME or not self.host.isprintable():
            return "has no name that a host may have"
        places = [*self.heartbeat.values(), *(failure.position for failure in self.failures)]
        return "" if all(map(_is_place, places)) else "reports a position that no rank can have"


def _is_place(at: Position) -> bool:
    numbers = at.case_index, at.since_ns, at.step, at.entered, at.device - waits.HOST
    return at.is_known and at.pid == 0 and all(0 <= number < _MOST_NUMBER for number in numbers)


class Order(msgspec.Struct, kw_only=True):
    """Node 0's answer. `job` comes once for each launch; `refused` is the reason why a node cannot take part."""

    phase: Phase
    launch: int = 0
    job: Job | None = None
    want_stacks: bool = False
    exit_code: int = 0
    refused: str = ""
