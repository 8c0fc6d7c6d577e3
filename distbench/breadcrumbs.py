"""Where a rank is, left in a small mmapped file so that it outlives the rank.

Writing one costs a microsecond or two: a sequence of fixed-size stores, no system call. Whoever watches maps the same
file; the stores are ordered so that a reader sees either the old position or the new one.
"""

from __future__ import annotations

import mmap
import struct
import time
from pathlib import Path

import msgspec

STAGES = ("start", "agree", "workload", "dispatch", "truncate", "experts", "combine", "check", "gather", "idle", "done")
ARMS = ("", "padded", "control", "repadded", "truncated")
_RECORD = struct.Struct("<qqqq")


class Position(msgspec.Struct, frozen=True):
    """Where a rank was last seen: the case's number in its launch, the arm (may be empty), the stage, and since when.

    `since_ns` is CLOCK_MONOTONIC in nanoseconds, comparable between the processes of one host.
    """

    case_index: int
    arm: str
    stage: str
    since_ns: int


class Breadcrumbs:
    """The writer's side, one for each rank."""

    def __init__(self, path: Path | None) -> None:
        """Map `path`, made anew; None keeps the position in memory alone."""
        self._file = None
        if path is None:
            self._map: mmap.mmap | bytearray = bytearray(_RECORD.size)
        else:
            path.write_bytes(bytes(_RECORD.size))
            self._file = path.open("r+b")
            self._map = mmap.mmap(self._file.fileno(), _RECORD.size)
        self.case_index = 0
        self.arm = ""
        self.mark("start")

    def mark(self, stage: str) -> None:
        """Record that this rank enters `stage` of the current case and arm."""
        _RECORD.pack_into(self._map, 0, self.case_index, ARMS.index(self.arm), STAGES.index(stage), time.monotonic_ns())

    def position(self) -> Position:
        """Return the position written last."""
        return _decode(bytes(self._map[: _RECORD.size]))

    def close(self) -> None:
        """Unmap the file; it stays on disk."""
        if isinstance(self._map, mmap.mmap):
            self._map.close()
        if self._file is not None:
            self._file.close()


def read_position(path: Path) -> Position | None:
    """Return what a rank wrote last to `path`, or None where it never started writing."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    return _decode(content) if len(content) == _RECORD.size and any(content) else None


def _decode(content: bytes) -> Position:
    case_index, arm, stage, since_ns = _RECORD.unpack(content)
    return Position(case_index, ARMS[arm], STAGES[stage], since_ns)
