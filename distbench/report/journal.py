"""`results.jsonl`: one report a line, on disk before the next case begins."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from distbench.errors import InvalidCase, Verdict
from distbench.report.document import SCHEMA, Report
from distbench.report.files import write_atomically
from distbench.values import one_line

RESULTS = "results.jsonl"
_BLOCK_BYTES = 64 << 10


class _Hash(msgspec.Struct, frozen=True):
    hash: str


class _Wall(msgspec.Struct, frozen=True):
    wall_s: float


class Line(msgspec.Struct, frozen=True, kw_only=True):
    """What progress and resuming need of a report; the rest of its line is passed over."""

    schema: str
    name: str
    verdict: Verdict
    exit_code: int
    as_expected: bool
    case: _Hash
    timing: _Wall


class Journal:
    """Appends reports. Holds a lock on the file, so that a writer left over from another launch is waited for."""

    def __init__(self, out: Path) -> None:
        """Open `out`/results.jsonl, made if needed, and cut off a last line that a kill left half written."""
        self._descriptor = os.open(out / RESULTS, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        _cut_torn_line(self._descriptor)

    def append(self, report: Report) -> None:
        """Write one line and return when it is on disk."""
        line = memoryview(msgspec.json.encode(report) + b"\n")
        while line:
            line = line[os.write(self._descriptor, line) :]
        os.fsync(self._descriptor)

    def close(self) -> None:
        """Let the file go."""
        os.close(self._descriptor)


class JournalReader:
    """Reads the lines that have come since it last looked, and holds none of them."""

    def __init__(self, out: Path) -> None:
        """Start at the beginning of `out`/results.jsonl, which may not exist yet."""
        self._path = out / RESULTS
        self._offset = 0
        self._number = 0

    def new_lines(self) -> Iterator[Line]:
        """Yield whole lines only; one that is being written waits for the next call.

        Raises:
            InvalidCase: a whole line is no report.

        """
        try:
            file = self._path.open("rb")
        except FileNotFoundError:
            return
        with file:
            file.seek(self._offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                self._offset += len(raw)
                self._number += 1
                yield self._decode(raw)

    def _decode(self, raw: bytes) -> Line:
        try:
            line = msgspec.json.decode(raw, type=Line)
        except (ValueError, RecursionError) as error:
            message = f"{self._path}, line {self._number}: {one_line(error)}; move the file away or use --rerun all"
            raise InvalidCase(message) from error
        if line.schema != SCHEMA:
            message = f"{self._path}, line {self._number}: schema {line.schema!r}, known is {SCHEMA}; use --rerun all"
            raise InvalidCase(message)
        return line


def repair_journal(out: Path) -> None:
    """Cut off a last line that a kill left half written, where there is a journal."""
    if (out / RESULTS).exists():
        Journal(out).close()


def filter_journal(out: Path, keep: Callable[[Line], bool]) -> None:
    """Drop the lines that `keep` does not hold for, atomically; of two lines for one case the first stays."""
    path = out / RESULTS
    if not path.exists():
        return
    repair_journal(out)
    kept, seen = [], set()
    with path.open("rb") as file:
        for raw, line in zip(file, JournalReader(out).new_lines(), strict=True):
            if line.case.hash not in seen and keep(line):
                kept.append(raw)
                seen.add(line.case.hash)
    write_atomically(path, b"".join(kept))


def _cut_torn_line(descriptor: int) -> None:
    """Truncate a file after its last line feed; a report never holds one inside."""
    size = end = os.fstat(descriptor).st_size
    while end:
        start = max(end - _BLOCK_BYTES, 0)
        found = os.pread(descriptor, end - start, start).rfind(b"\n") + 1
        end = start + found
        if found:
            break
    if end < size:
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)
