"""Where a rank is, left in a small mmapped file so that it outlives the rank.

Writing one costs a microsecond or two: one store of a fixed-size record, no system call. Whoever watches reads the
same file.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

import msgspec

from distbench.process import pid_space

STAGES = (
    "start",
    "agree",
    "workload",
    "compile",
    "dispatch",
    "truncate",
    "experts",
    "check",
    "combine",
    "timing",
    "gather",
    "report",
    "done",
)
ARMS = ("", "padded", "control", "repadded", "truncated")
_RECORD = struct.Struct("<qqqqqqq")


class Position(msgspec.Struct, frozen=True):
    """Where a rank was last seen.

    `case_index` counts the cases of a launch, `arm` and `stage` index ARMS and STAGES. `since_ns` is CLOCK_MONOTONIC
    in nanoseconds, comparable between the processes of one host. `step` counts the stages entered since the case
    began: all ranks of a case pass the same ones, some of them several times. `pid` is 0 for a rank of another host.
    """

    case_index: int
    arm: int
    stage: int
    since_ns: int
    pid: int
    step: int

    @property
    def is_known(self) -> bool:
        """Whether there are such an arm and stage."""
        return 0 <= self.arm < len(ARMS) and 0 <= self.stage < len(STAGES)

    @property
    def stage_name(self) -> str:
        """The stage in words."""
        return STAGES[self.stage]

    @property
    def arm_name(self) -> str:
        """The arm in words; empty between arms."""
        return ARMS[self.arm]

    @property
    def place(self) -> str:
        """Arm and stage, as a message says it."""
        return f"{self.arm_name}/{self.stage_name}" if self.arm else self.stage_name

    @property
    def progress(self) -> tuple[int, int]:
        """How far the rank has come, comparable between the ranks of a launch."""
        return self.case_index, self.step


class Breadcrumbs:
    """The writer's side, one for each rank."""

    def __init__(self, path: Path | None) -> None:
        """Map `path`, made anew; None keeps the position in memory alone."""
        self._file = None
        self._pid, self._space = os.getpid(), pid_space()
        if path is None:
            self._map: mmap.mmap | bytearray = bytearray(_RECORD.size)
        else:
            path.write_bytes(bytes(_RECORD.size))
            self._file = path.open("r+b")
            self._map = mmap.mmap(self._file.fileno(), _RECORD.size)
        self._step = 0
        self.case_index = 0
        self.arm = ""
        self.mark("start")

    def mark(self, stage: str) -> None:
        """Record that this rank enters `stage` of the current case and arm."""
        arm, number = ARMS.index(self.arm), STAGES.index(stage)
        self._step = self._step + 1 if number else 0
        record = _RECORD.pack(self.case_index, arm, number, time.monotonic_ns(), self._pid, self._step, self._space)
        self._map[: _RECORD.size] = (
            record  # pack_into would zero it first, and a reader would see a rank with no process
        )

    def position(self) -> Position:
        """Return the position written last."""
        return Position(*_RECORD.unpack_from(self._map)[:-1])

    def close(self) -> None:
        """Unmap the file; it stays on disk."""
        if isinstance(self._map, mmap.mmap):
            self._map.close()
        if self._file is not None:
            self._file.close()


def write_position(path: Path, position: Position) -> None:
    """Leave in `path` what a rank of another host has told of itself."""
    path.write_bytes(_RECORD.pack(*msgspec.structs.astuple(position), pid_space()))


def read_position(path: Path) -> Position | None:
    """Return what a rank wrote last to `path`, or None where it never started writing, or the file is no such file.

    A process id of another host says nothing here, and comes as 0.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) != _RECORD.size or not any(content):
        return None
    *fields, space = _RECORD.unpack(content)
    position = Position(*fields)
    if space != pid_space():
        position = msgspec.structs.replace(position, pid=0)
    return position if position.is_known and position.case_index >= 0 else None
