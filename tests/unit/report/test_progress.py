"""Progress: plain lines in a log, one live line on a terminal, no output with --quiet."""

from __future__ import annotations

import argparse
import fcntl
import io
import os
import pty
import re
import select
import struct
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import msgspec
import pytest

from distbench.cli import presets
from distbench.cli.main import main
from distbench.report import progress as module
from distbench.report.journal import Line
from distbench.report.progress import Meter, Progress, aside, span
from distbench.report.schema import SCHEMA
from distbench.report.terminal import print_line, print_note, print_step
from distbench.utils.voice import Voice, set_voice
from tests.end_to_end.launches import wait_until

COLUMNS = 80
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

    def shown() -> str:
        text = b""
        while select.select([screen], [], [], 0.05)[0]:  # the kernel hands it over a moment later
            text += os.read(screen, 1 << 16)
        return text.decode()

    with os.fdopen(side, "w") as stream:
        yield stream, shown
    os.close(screen)


def lines(shown: str) -> list[str]:
    """Lines that a terminal showed, one after another, without its control sequences."""
    return [
        one.strip(" \u2501\u2578\u257a")
        for one in re.split(r"[\r\n]+", re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown))
        if one.strip()
    ]


@pytest.fixture(autouse=True)
def _usual_voice() -> Iterator[None]:
    yield
    set_voice(Voice.USUAL)
    module.open_meters.clear()


@pytest.fixture
def still(monkeypatch: pytest.MonkeyPatch) -> None:
    """Meters that draw only when a test makes them."""
    monkeypatch.setattr(threading.Thread, "start", lambda _: None)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Setter that advances the monotonic clock by some seconds."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    return forward


@pytest.mark.usefixtures("still")
def test_log_gets_a_line_for_each_case_and_one_every_few_seconds(
    clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Log, "every_s", 1.95)
    stream = io.StringIO()
    progress = Progress(4, what="suite x", stream=stream)
    progress.take(line("old"), quiet=True)
    progress.refresh("next", "padded/experts", 3, 1000)
    progress.take(line("good"))
    for _ in range(40):
        clock(0.1)
        module.open_meters[-1].draw()
    progress.take(line("bad", "CORRUPT", as_expected=False))
    clock(2)
    module.open_meters[-1].draw()
    progress.close()
    assert stream.getvalue().splitlines() == [
        "     2/4 PASS                0.250 s  good",
        "distbench: suite x: 2/4, 4 s left, now next, padded/experts, repeat 3/1000",
        "distbench: suite x: 2/4, 8 s left, now next, padded/experts, repeat 3/1000",
        "     3/4 CORRUPT             0.250 s  bad  UNEXPECTED",
        "distbench: suite x: 3/4, 1 failed, 3 s left, now next, padded/experts, repeat 3/1000",
    ]


@pytest.mark.usefixtures("still")
def test_single_case_counts_its_repeats(clock: Callable[[float], None]) -> None:
    stream = io.StringIO()
    progress = Progress(1, what="run", each=False, expected=False, stream=stream)
    progress.refresh("run", "padded/experts", 250, 1000)
    clock(5)
    module.open_meters[-1].draw()
    progress.take(line("run", "CORRUPT", as_expected=False))
    progress.close()
    assert stream.getvalue() == "distbench: run: 250/1000, 15 s left, now padded/experts\n"


@pytest.mark.usefixtures("still")
def test_terminal_gets_one_live_line_with_counts_and_the_time_left(
    terminal: Terminal, clock: Callable[[float], None]
) -> None:
    stream, shown = terminal
    progress = Progress(10, what="suite x", stream=stream)
    progress.take(line("old"), quiet=True)
    progress.refresh("next")
    clock(2)
    module.open_meters[-1].draw()
    assert lines(shown()) == ["suite x: 1/10, for 2 s, now next"]
    progress.take(line("a"))
    progress.take(line("b"))
    assert lines(shown()) == []
    clock(2)
    module.open_meters[-1].draw()
    assert lines(shown()) == ["suite x: 3/10, 14 s left, now next"]
    progress.take(line("bad", "CORRUPT", as_expected=False))
    progress.give_back(as_expected=True)
    assert lines(shown())[-1:] == ["4/10 CORRUPT             0.250 s  bad  UNEXPECTED"]
    clock(2)
    module.open_meters[-1].draw()
    assert lines(shown()) == ["suite x: 3/10, 1 failed, 21 s left, now next"]
    progress.close()
    assert shown().endswith("\x1b[2K\x1b[?25h") or shown() == ""


@pytest.mark.usefixtures("still")
@pytest.mark.parametrize("columns", [80, 59, 40])
def test_live_line_fits_the_terminal_and_keeps_its_counts(
    terminal: Terminal, clock: Callable[[float], None], columns: int
) -> None:
    stream, shown = terminal
    fcntl.ioctl(stream.fileno(), termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with Meter("bisect: swaps of one part", 10, stream=stream) as meter:
        meter.done, meter.now = 4, "x" * 200 + "\x1b[31m"
        clock(1)
        meter.draw()
        text = shown()
    assert "\x1b[31m" not in text
    (told,) = lines(text)
    assert "4/10, 2 s left" in told
    drawn = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", text).strip("\r\n")
    assert len(drawn) <= columns


@pytest.mark.usefixtures("still")
def test_inner_meter_takes_the_line_of_the_outer_one(clock: Callable[[float], None]) -> None:
    stream = io.StringIO()
    with Meter("suite", stream=stream) as outer:
        for seconds in (1.0, 1.0):
            with Meter("waiting for nodes", 4, stream=stream) as inner:
                clock(seconds)
                outer.draw()
                inner.draw()
        clock(2)
        outer.draw()
    assert stream.getvalue().splitlines() == ["distbench: waiting for nodes: 0/4, for 1 s", "distbench: suite: for 4 s"]


def test_meter_draws_by_itself_while_the_work_does_not_return(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "LOG_S", 0.05)
    monkeypatch.setattr(module.Log, "every_s", 0.05)
    monkeypatch.setattr(module, "WAKE_S", 0.02)
    stream = io.StringIO()
    with Meter("work", stream=stream):
        assert wait_until(lambda: stream.getvalue().count("distbench: work: for ") >= 2, 20)
    count = stream.getvalue().count("distbench: work: for ")
    time.sleep(0.2)
    assert stream.getvalue().count("\n") == count


def test_closed_standard_error_ends_the_progress_and_not_the_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.Log, "every_s", 0.0)
    monkeypatch.setattr(module, "WAKE_S", 0.01)
    stream = io.StringIO()
    stream.close()
    with Meter("work", stream=stream):
        time.sleep(0.05)


def test_longest_gap_between_lines_of_a_log_is_two_seconds() -> None:
    assert module.LOG_S + module.WAKE_S <= 2


@pytest.mark.usefixtures("still")
def test_other_output_erases_the_live_line_first(
    terminal: Terminal, clock: Callable[[float], None], capsys: pytest.CaptureFixture[str]
) -> None:
    stream, shown = terminal
    with Meter("work", stream=stream) as meter:
        clock(1)
        meter.draw()
        shown()
        print_line("result")
        print_note("note")
        assert shown().endswith("\x1b[?25h\r\x1b[1A\x1b[2K")
        with aside():
            assert shown() == ""
    assert capsys.readouterr() == ("result\n", "distbench: note\n")


@pytest.mark.usefixtures("still")
def test_verbose_terminal_gets_a_line_for_each_case(terminal: Terminal) -> None:
    stream, shown = terminal
    set_voice(Voice.VERBOSE)
    progress = Progress(2, what="selftest", each=False, expected=False, stream=stream)
    progress.take(line("bad", "DRIFT", as_expected=False))
    assert shown() == "     1/2 DRIFT               0.250 s  bad\r\n"


@pytest.mark.parametrize("voice", [Voice.QUIET, Voice.USUAL])
def test_quiet_progress_prints_nothing(
    terminal: Terminal, clock: Callable[[float], None], voice: Voice, capsys: pytest.CaptureFixture[str]
) -> None:
    stream, shown = terminal
    log = io.StringIO()
    set_voice(voice)
    quiet = voice is Voice.USUAL
    for progress in (Progress(2, quiet=quiet, stream=stream), Progress(2, quiet=quiet, stream=log)):
        progress.take(line("bad", "DRIFT", as_expected=False))
        clock(5)
        progress.refresh("next")
        assert module.open_meters == []
        progress.close()
    print_step("a step")
    assert shown() == log.getvalue() == ""
    assert capsys.readouterr().err == ("" if voice is Voice.QUIET else "distbench: a step\n")


@pytest.mark.usefixtures("still")
def test_dumb_terminal_and_a_stream_that_falsely_reports_one_get_lines_of_bounded_width(
    tmp_path: Path, clock: Callable[[float], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Pretender(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            return descriptor

    with (tmp_path / "file").open("w") as file:
        descriptor = file.fileno()
        live, dumb = Pretender(), Pretender()
        with Meter("x" * 200, stream=live) as meter:
            clock(2)
            meter.draw()
        assert "x" * 50 in live.getvalue()
        assert max(map(len, lines(live.getvalue()))) <= 80
        monkeypatch.setenv("TERM", "dumb")
        with Meter("work", stream=dumb) as meter:
            clock(2)
            meter.draw()
        assert dumb.getvalue() == "distbench: work: for 2 s\n"


@pytest.mark.parametrize(
    ("seconds", "text"), [(-1, "0 s"), (59.4, "59 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")]
)
def test_span_is_a_duration_in_words(seconds: float, text: str) -> None:
    assert span(seconds) == text


def test_command_that_lasts_prints_its_progress(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown = ""

    def slow(_: argparse.Namespace) -> int:
        assert wait_until(told, 20)
        return 0

    def told() -> bool:
        nonlocal shown
        shown += capsys.readouterr().err
        return "\n" in shown

    slow.__module__ = presets.__name__
    monkeypatch.setattr(module.Log, "every_s", 0.1)
    monkeypatch.setattr(presets, "_presets", slow)
    assert main(["presets"]) == 0
    assert re.match(r"distbench: presets: for \d+ s\n", shown)
