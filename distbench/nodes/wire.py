"""What travels between node 0 and the other nodes: one line of JSON each way, about twice a second."""

from __future__ import annotations

from enum import Enum

import msgspec

from distbench.breadcrumbs import Position
from distbench.job import Job, Machine, RankFailure
from distbench.postmortem import Exit

BEAT_S = 0.5
# Without a word for so long, the other side is taken for lost.
SILENCE_S = 15.0


class Phase(str, Enum):
    """What node 0 wants of the others."""

    WAIT = "wait"
    RUN = "run"
    STOP = "stop"
    END = "end"


class Beat(msgspec.Struct, kw_only=True):
    """How a node stands. In `crumbs`, `since_ns` is an age, since hosts share no clock, and `pid` is 0.

    `launch` is the last one that the node began, 0 for none; `ended` says that its ranks are gone, `exit` which of them
    went first, `failures` what they said, and `machines` where they run. `refused` says why the node leaves, which it
    then does.
    """

    node: int
    nodes: int
    nproc: int
    host: str
    launch: int = 0
    ended: bool = False
    exit: Exit | None = None
    crumbs: dict[int, Position] = {}
    failures: list[RankFailure] = []
    machines: dict[int, Machine] = {}
    stacks: dict[int, str] = {}
    refused: str = ""


class Order(msgspec.Struct, kw_only=True):
    """What node 0 answers. `job` comes once for each launch; `refused` says why a node cannot take part."""

    phase: Phase
    launch: int = 0
    job: Job | None = None
    want_stacks: bool = False
    exit_code: int = 0
    refused: str = ""
