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
        """Open `out`/results.jsonl, made if needed."""
        self._descriptor = os.open(out / RESULTS, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)

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
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
        except FileNotFoundError:
            return
        whole = content.rfind(b"\n") + 1
        self._offset += whole
        for raw in content[:whole].splitlines():
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
    """Cut off a last line that a kill left half written; a report never holds a line feed inside."""
    path = out / RESULTS
    if not path.exists():
        return
    with path.open("r+b") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)
            os.fsync(file.fileno())


def filter_journal(out: Path, keep: Callable[[Line], bool]) -> None:
    """Drop the lines that `keep` does not hold for, atomically; of two lines for one case the first stays."""
    path = out / RESULTS
    if not path.exists():
        return
    repair_journal(out)
    kept, seen = [], set()
    for raw, line in zip(path.read_bytes().splitlines(keepends=True), JournalReader(out).new_lines(), strict=True):
        if line.case.hash not in seen and keep(line):
            kept.append(raw)
            seen.add(line.case.hash)
    write_atomically(path, b"".join(kept))
