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
        self.count = 0

    def note(self, peer: str, why: str) -> None:
        """Write a line for a peer; `why` is this program's own text: nothing that the peer sent is quoted."""
        with self._lock:
            self.count += 1
            if self._path is not None and self.count <= MOST_LINES + 1:
                line = f"{time.strftime('%Y-%m-%dT%H:%M:%S%z')} {peer}: {why}\n"
                if self.count > MOST_LINES:
                    line = f"more than {MOST_LINES} peers were refused; those that follow are counted only\n"
                with contextlib.suppress(OSError), self._path.open("a", encoding="utf-8") as file:
                    file.write(line)
            now = time.monotonic()
            if self._said_at is None or now - self._said_at > _SAY_EVERY_S:
                self._said_at = now
                with contextlib.suppress(OSError):
                    sys.stderr.write(f"distbench: refused {peer}: {why}{self._so_far()}\n")

    def summary(self) -> str:
        """Number of refused peers and the file with their lines; empty for none."""
        if not self.count:
            return ""
        where = f", {self._path} has a line for each" if self._path is not None else ""
        return f"{self.count} {'peers were' if self.count > 1 else 'peer was'} refused{where}"

    def _so_far(self) -> str:
        return f" ({self.summary()})" if self.count > 1 else ""
