"""A line for each refused peer: in a file, and occasionally on standard error."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from pathlib import Path

# Strangers must not be able to fill the disk.
MOST_LINES = 100_000
_SAY_EVERY_S = 10.0


class Refusals:
    """Counts refused peers, each with a line in `path`; without one they are only counted. Thread-safe."""

    def __init__(self, path: Path | None) -> None:
        """The file is created with the first line."""
        self._path = path
        self._lock = threading.Lock()
        self._said_at: float | None = None
        self._lines = _count_lines(path)
        self.count = 0

    def note(self, peer: str, why: str) -> None:
        """Write a line for a peer; `why` is this program's own text: nothing that the peer sent is quoted."""
        with self._lock:
            self.count += 1
            self._append(f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {peer}: {why}\n")
            now = time.monotonic()
            if self._said_at is None or now - self._said_at > _SAY_EVERY_S:
                self._said_at = now
                with contextlib.suppress(OSError):
                    sys.stderr.write(f"distbench: refused {peer}: {why}{self._so_far()}\n")

    def summary(self) -> str:
        """Number of refused peers and the file with their lines; empty for none."""
        if not self.count:
            return ""
        each = "" if self._lines <= MOST_LINES else f" up to {MOST_LINES}"
        where = f", {self._path} has a line for each{each}" if self._path is not None else ""
        return f"{self.count} {'peers were' if self.count > 1 else 'peer was'} refused{where}"

    def _append(self, line: str) -> None:
        """Append a line, up to MOST_LINES in the file whatever launch wrote them, and one that says so."""
        if self._path is None or self._lines > MOST_LINES:
            return
        if self._lines == MOST_LINES:
            line = f"more than {MOST_LINES} peers were refused; those that follow are counted only\n"
        self._lines += 1
        with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
            file.write(line)

    def _so_far(self) -> str:
        return f" ({self.summary()})" if self.count > 1 else ""


def _count_lines(path: Path | None) -> int:
    """Number of lines that earlier launches left in the file; 0 where it cannot be read."""
    with contextlib.suppress(OSError):
        if path is not None:
            with path.open("rb") as file:
                return sum(1 for _ in file)
    return 0
