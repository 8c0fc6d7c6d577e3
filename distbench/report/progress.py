"""Progress of a suite: a live line on a terminal, a plain line for each case in a log, or nothing."""

from __future__ import annotations

import os
import sys
import time
from typing import TextIO

from distbench.report.journal import Line
from distbench.utils.text import printable

_CLEAR = "\r\x1b[K"
_REFRESH_S = 0.2
_COLUMNS = 80


class Progress:
    """Counts finished cases on standard error: passed if the case ended as expected, else failed."""

    def __init__(self, total: int, *, quiet: bool, stream: TextIO | None = None) -> None:
        """Expect `total` cases."""
        stream = sys.stderr if stream is None else stream
        self._total = total
        self._quiet = quiet
        self._stream = stream
        self._live = stream.isatty()
        self._done = self._skipped = self._failed = 0
        self._started = self._shown = time.monotonic()

    def take(self, line: Line, *, quiet: bool = False) -> None:
        """Count a finished case; `quiet` for one that an earlier run finished."""
        self._done += 1
        self._skipped += quiet
        self._failed += not line.as_expected
        if self._quiet or quiet or (self._live and line.as_expected):
            return
        surprise = "" if line.as_expected else "  UNEXPECTED"
        name = printable(line.name)
        text = f"{self._done:>6}/{self._total} {line.verdict.value:<16} {line.timing.wall_s:8.3f} s  {name}"
        self._stream.write(f"{_CLEAR if self._live else ''}{text}{surprise}\n")
        self._stream.flush()

    def give_back(self, *, as_expected: bool) -> None:
        """Uncount a finished case that will be counted again with another ending."""
        self._done -= 1
        self._failed -= not as_expected

    def refresh(self, current: str) -> None:
        """Redraw the live line, if there is one; `current` is the case under way, or empty."""
        now = time.monotonic()
        if self._quiet or not self._live or now - self._shown < _REFRESH_S:
            return
        self._shown = now
        rate = (self._done - self._skipped) / (now - self._started)
        left = f"{(self._total - self._done) / rate:.0f} s left" if rate > 0 else "starting"
        counts = f"{self._done}/{self._total} done, {self._done - self._failed} passed, {self._failed} failed"
        text = f"{counts}, {rate:.1f}/s, {left}{f', now {printable(current)}' if current else ''}"
        self._stream.write(_CLEAR + text[: self._columns() - 1])
        self._stream.flush()

    def _columns(self) -> int:
        """Width of the terminal; a longer line could not be erased."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _COLUMNS
        except OSError:
            return _COLUMNS

    def close(self) -> None:
        """Erase the live line."""
        if self._live and not self._quiet:
            self._stream.write(_CLEAR)
            self._stream.flush()
