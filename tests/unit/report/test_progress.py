"""Progress: one line per case in a log, one live line on a terminal, no output with --quiet."""

from __future__ import annotations

import fcntl
import io
import os
import pty
import struct
import termios
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import msgspec
import pytest

from distbench.report.journal import Line
from distbench.report.progress import Progress
from distbench.report.schema import SCHEMA

COLUMNS = 80
CLEAR = "\r\x1b[K"
Terminal = tuple[TextIO, Callable[[], str]]


def line(name: str, verdict: str = "PASS", *, as_expected: bool = True) -> Line:
    fields = {"name": name, "verdict": verdict, "exit_code": 0, "as_expected": as_expected}
    rest = {"schema": SCHEMA, "case": {"hash": name}, "timing": {"wall_s": 0.25}, "expect": "PASS", "limit": None}
    return msgspec.convert(fields | rest, Line)


@pytest.fixture
def terminal() -> Iterator[Terminal]:
    """Yield the stream of a terminal of COLUMNS columns, and a reader of its other side."""
    screen, side = pty.openpty()
    fcntl.ioctl(side, termios.TIOCSWINSZ, struct.pack("HHHH", 24, COLUMNS, 0, 0))
    os.set_blocking(screen, False)

    def shown() -> str:
        try:
            return os.read(screen, 1 << 16).decode()
        except BlockingIOError:
            return ""

    with os.fdopen(side, "w") as stream:
        yield stream, shown
    os.close(screen)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Setter that advances the monotonic clock by some seconds."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


def test_log_stream_gets_one_plain_line_per_case(clock: Callable[[float], None]) -> None:
    stream = io.StringIO()
    progress = Progress(3, quiet=False, stream=stream)
    progress.take(line("old"), quiet=True)
    progress.take(line("good"))
    clock(10)
    progress.refresh("next")
    progress.take(line("bad", "CORRUPT", as_expected=False))
    progress.close()
    assert stream.getvalue().splitlines() == [
        "     2/3 PASS                0.250 s  good",
        "     3/3 CORRUPT             0.250 s  bad  UNEXPECTED",
    ]


def test_terminal_gets_one_live_line(terminal: Terminal, clock: Callable[[float], None]) -> None:
    stream, shown = terminal
    progress = Progress(10, quiet=False, stream=stream)
    progress.take(line("old"), quiet=True)
    progress.refresh("next")
    assert shown() == ""
    clock(2)
    progress.refresh("next")
    assert shown() == f"{CLEAR}1/10 done, 1 passed, 0 failed, 0.0/s, starting, now next"
    progress.take(line("a"))
    assert shown() == ""
    progress.take(line("b"))
    clock(2)
    progress.refresh("")
    assert shown() == f"{CLEAR}3/10 done, 3 passed, 0 failed, 0.5/s, 14 s left"
    progress.take(line("bad", "CORRUPT", as_expected=False))
    progress.give_back(as_expected=True)
    shown()
    clock(2)
    progress.refresh("a case")
    assert shown() == f"{CLEAR}3/10 done, 2 passed, 1 failed, 0.3/s, 21 s left, now a case"
    progress.give_back(as_expected=False)
    clock(2)
    progress.refresh("a case")
    assert shown().startswith(f"{CLEAR}2/10 done, 2 passed, 0 failed, ")
    progress.close()
    assert shown() == CLEAR


def test_live_line_is_cut_to_the_terminal_width(terminal: Terminal, clock: Callable[[float], None]) -> None:
    stream, shown = terminal
    progress = Progress(10, quiet=False, stream=stream)
    clock(1)
    progress.refresh("x" * 200)
    text = shown()
    assert text.startswith(CLEAR)
    assert len(text) - len(CLEAR) == COLUMNS - 1


def test_terminal_keeps_a_line_for_each_unexpected_result(terminal: Terminal) -> None:
    stream, shown = terminal
    progress = Progress(2, quiet=False, stream=stream)
    progress.take(line("bad", "DRIFT", as_expected=False))
    assert shown() == f"{CLEAR}     1/2 DRIFT               0.250 s  bad  UNEXPECTED\r\n"


def test_quiet_progress_prints_nothing(terminal: Terminal, clock: Callable[[float], None]) -> None:
    stream, shown = terminal
    log = io.StringIO()
    for progress in (Progress(2, quiet=True, stream=stream), Progress(2, quiet=True, stream=log)):
        progress.take(line("bad", "DRIFT", as_expected=False))
        clock(5)
        progress.refresh("next")
        progress.close()
    assert shown() == log.getvalue() == ""


def test_stream_that_falsely_reports_a_terminal_gets_plain_lines(
    tmp_path: Path, clock: Callable[[float], None]
) -> None:
    class Pretender(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return descriptor

    with (tmp_path / "file").open("w") as file:
        descriptor = file.fileno()
        stream = Pretender()
        progress = Progress(1, quiet=False, stream=stream)
        clock(1)
        progress.refresh("x" * 200)
    assert len(stream.getvalue()) == len(CLEAR) + 79
