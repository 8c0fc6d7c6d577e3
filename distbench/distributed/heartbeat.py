"""A rank's heartbeat: its position and its wait, in a small mmapped file that outlives the rank.

A mark costs a microsecond or two: one store of a fixed-size record, no system call. A supervisor reads the same file.
"""

from __future__ import annotations

import mmap
import os
import struct
import time
from pathlib import Path

import msgspec

from distbench.case.stages import ARMS, STAGES, Stage
from distbench.distributed import waits
from distbench.utils.process import pid_space

_RECORD = struct.Struct("<8q")
_WAITS = struct.Struct(f"<{waits.WORDS}q")
_SIZE = _RECORD.size + _WAITS.size
_PLACES = 6  # fields of a position before the wait


class Position(msgspec.Struct, frozen=True):
    """Position of a rank at its last mark.

    `case_index` counts the cases of a launch, `arm` and `stage` index ARMS and STAGES. `since_ns` is CLOCK_MONOTONIC
    in nanoseconds, comparable between the processes of one host. `step` counts the stages entered since the case
    began: all ranks of a case pass the same stages, some of them several times. `pid` is 0 for a rank of another host.
    `missing` is one more than the rank whose signal its device has waited for in vain, 0 for none.
    `waiting` and `kind` index waits.KINDS: the rank's current wait, and the last collective that it entered, which is
    number `entered` of the case, on `device` (-1: the host). `repeat` counts the repeats of the arms that have ended.
    """

    case_index: int
    arm: int
    stage: int
    since_ns: int
    pid: int
    step: int
    waiting: int = 0
    entered: int = 0
    kind: int = 0
    device: int = waits.HOST
    missing: int = 0
    repeat: int = 0

    @property
    def is_known(self) -> bool:
        """Whether arm, stage, wait and collective are valid indices."""
        waiting, kind = (0 <= number < len(waits.KINDS) for number in (self.waiting, self.kind))
        return 0 <= self.arm < len(ARMS) and 0 <= self.stage < len(STAGES) and waiting and kind and self.missing >= 0

    @property
    def stage_name(self) -> Stage:
        """Name of the stage."""
        return STAGES[self.stage]

    @property
    def arm_name(self) -> str:
        """Name of the arm; empty between arms."""
        return ARMS[self.arm]

    @property
    def place(self) -> str:
        """Arm and stage, as messages name them."""
        return f"{self.arm_name}/{self.stage_name}" if self.arm else self.stage_name

    @property
    def progress(self) -> tuple[int, int, int]:
        """Progress of the rank, comparable between the ranks of a launch: case, stage, collective."""
        return self.case_index, self.step, self.entered

    @property
    def waits_for(self) -> str:
        """Name of the rank's wait; empty where the rank declares none."""
        return waits.KINDS[self.waiting]

    @property
    def collective(self) -> str:
        """The last collective that the rank entered in this case, as messages name it; empty for none."""
        if not self.entered:
            return ""
        where = " on a device" if self.device != waits.HOST else ""
        return f"{waits.KINDS[self.kind]} (collective {self.entered} of the case{where})"


class Heartbeat:
    """The writer's side, one for each rank."""

    def __init__(self, path: Path | None) -> None:
        """Map a new file at `path` and record this process's waits there; None keeps the position in memory."""
        self._file = None
        self._pid, self._space = os.getpid(), pid_space()
        if path is None:
            self._map: mmap.mmap | bytearray = bytearray(_SIZE)
        else:
            path.write_bytes(bytes(_SIZE))
            self._file = path.open("r+b")
            self._map = mmap.mmap(self._file.fileno(), _SIZE)
        self._waits = memoryview(self._map)[_RECORD.size :].cast("q")
        if path is not None:
            waits.write_to(self._waits)
        self._step = self._case_index = self.repeat = 0
        self.arm = ""
        self.mark(Stage.START)

    @property
    def case_index(self) -> int:
        """Index of the case in its launch; setting another one restarts the count of collectives."""
        return self._case_index

    @case_index.setter
    def case_index(self, index: int) -> None:
        if index != self._case_index:
            waits.begin_case(self._waits)
        self._case_index = index

    def mark(self, stage: Stage) -> None:
        """Record that this rank enters `stage` of the current case and arm."""
        arm, number = ARMS.index(self.arm), STAGES.index(stage)
        self._step = self._step + 1 if number else 0
        where = (self.case_index, arm, number, time.monotonic_ns(), self._pid, self._step)
        record = _RECORD.pack(*where, self._space, self.repeat)
        self._map[: _RECORD.size] = (
            record  # pack_into would zero it first, and a reader would see a rank without a process
        )

    def position(self) -> Position:
        """The position written last."""
        *places, _, repeat = _RECORD.unpack_from(self._map)
        fields = (*places, *_WAITS.unpack_from(self._map, _RECORD.size), repeat)
        return Position(*fields)

    def close(self) -> None:
        """Record the wait for the end of the launch, and unmap the file; it stays on disk."""
        if self._file is None or not isinstance(self._map, mmap.mmap):
            return
        waits.waiting("end of the launch").__enter__()
        waits.write_to(waits.no_heartbeat())
        self._waits.release()
        self._map.close()
        self._file.close()


def write_position(path: Path, position: Position) -> None:
    """Write the position that a rank of another host has sent."""
    fields = msgspec.structs.astuple(position)
    record = _RECORD.pack(*fields[:_PLACES], pid_space(), position.repeat)
    path.write_bytes(record + _WAITS.pack(*fields[_PLACES:-1]))


def is_whole(path: Path) -> bool:
    """Whether the file at `path` has the size of a heartbeat."""
    return path.stat().st_size == _SIZE


def read_position(path: Path) -> Position | None:
    """Last position written to `path`; None where the rank never wrote one, or the file has another format.

    A process id of another host is meaningless here, and is returned as 0.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return None
    if len(content) != _SIZE or not any(content[: _RECORD.size]):  # a rank writes its waits before its first mark
        return None
    *places, space, repeat = _RECORD.unpack_from(content)
    fields = (*places, *_WAITS.unpack_from(content, _RECORD.size), repeat)
    position = Position(*fields)
    if space != pid_space():
        position = msgspec.structs.replace(position, pid=0)
    return position if position.is_known and position.case_index >= 0 else None
