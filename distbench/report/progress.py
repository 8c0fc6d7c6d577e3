"""Progress of long work on standard error: a live line on a terminal, plain lines in a log, nothing with --quiet."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, TextIO

from distbench.utils.streams import plain
from distbench.utils.text import printable
from distbench.utils.voice import Voice, voice

if TYPE_CHECKING:
    from distbench.report.journal import Line

LOG_S = 1.4
"""Seconds between plain lines of a log: at least one every 2 s, even if the thread wakes half a second late."""
_LIVE_S = 0.4
WAKE_S = 0.1
_COLUMNS, _BAR = 80, 16
_LEAST_FOR_BAR = 60
_MINUTE, _HOUR = 60, 3600

open_meters: list[Meter] = []
"""Meters that are open, the innermost last: it alone is drawn."""
_last_drawn = [0.0]
"""When anything was drawn last, by any meter: many short ones in a row leave no longer gaps than one."""


class Meter:
    """What is being done, done of total, and the time left: drawn by a thread of its own until it is closed.

    A meter that opens inside another one takes its line until it closes. `before` of `done` were done by an earlier
    run, and say nothing about the pace; `also` stands behind the counts, `now` at the end.
    """

    def __init__(self, what: str, total: int = 0, *, stream: TextIO | None = None) -> None:
        """`total` 0: not known."""
        self.what, self.total = what, total
        self.done = self.before = 0
        self.also = self.now = ""
        self._started = time.monotonic()
        self._over = threading.Event()
        self._lock = threading.RLock()
        self._stream = sys.stderr if stream is None else stream
        self._face: Live | Log = Live(self._stream) if _is_screen(self._stream) else Log(self._stream)

    def __enter__(self) -> Meter:  # noqa: PYI034 - Self comes with Python 3.11
        self.open()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def open(self) -> None:
        """Begin to draw, unless the command is quiet."""
        if voice() is Voice.QUIET or self in open_meters:
            return
        if open_meters:
            open_meters[-1].hide()
        else:
            _rest()
        open_meters.append(self)
        threading.Thread(target=self._draw_on, name="progress", daemon=True).start()

    def restart(self) -> None:
        """Measure the pace from now on: other work begins."""
        self._started = time.monotonic()

    def close(self) -> None:
        """Erase the live line, and draw no more."""
        self._over.set()
        self.hide()
        if self in open_meters:
            open_meters.remove(self)

    def say(self, text: str) -> None:
        """Print a line of its own, above the live one."""
        with self._lock:
            self._face.hide()
            self._stream.write(f"{plain(printable(text), self._stream)}\n")
            self._stream.flush()
            _rest()

    def hide(self) -> None:
        """Erase the live line until it is drawn again."""
        with self._lock, contextlib.suppress(OSError, ValueError):
            self._face.hide()

    def draw(self) -> None:
        """Draw the state, where it is due."""
        with self._lock:
            due = time.monotonic() - _last_drawn[0] >= self._face.every_s
            if due and not self._over.is_set() and open_meters[-1:] == [self]:
                self._face.draw(self)
                _rest()

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Hold the screen for other output."""
        with self._lock:
            self.hide()
            yield

    @property
    def counts(self) -> str:
        """Done of total, with what stands behind it; may be empty."""
        counted = f"{self.done}/{self.total}" if self.total else ""
        return ", ".join(filter(None, (counted, self.also)))

    @property
    def time(self) -> str:
        """Time left, or where that is not known the time so far."""
        passed = time.monotonic() - self._started
        pace = (self.done - self.before) / passed if passed > 0 else 0.0
        if self.total and pace > 0:
            return f"{span((self.total - self.done) / pace)} left"
        return f"for {span(passed)}"

    @property
    def text(self) -> str:
        """The state as one line."""
        parts = (self.counts, self.time, f"now {self.now}" if self.now else "")
        return printable(f"{self.what}: {', '.join(filter(None, parts))}")

    def _draw_on(self) -> None:
        with contextlib.suppress(OSError, ValueError):  # standard error is closed: the result does not depend on it
            while not self._over.wait(WAKE_S):
                self.draw()


def aside() -> contextlib.AbstractContextManager[None]:
    """Context for other output: the live line, if there is one, is erased, and drawn again later."""
    return open_meters[-1].aside() if open_meters else contextlib.nullcontext()


def span(seconds: float) -> str:
    """A duration as `12 s`, `3 min 20 s`, `2 h 5 min`."""
    whole = max(round(seconds), 0)
    if whole < _MINUTE:
        return f"{whole} s"
    if whole < _HOUR:
        return f"{whole // _MINUTE} min {whole % _MINUTE} s"
    return f"{whole // _HOUR} h {whole % _HOUR // _MINUTE} min"


def _is_screen(stream: TextIO) -> bool:
    """Whether a live line can be drawn: a terminal that moves its cursor."""
    return not stream.closed and stream.isatty() and os.environ.get("TERM", "") not in ("dumb", "unknown")


def _rest() -> None:
    _last_drawn[:] = [time.monotonic()]


class Log:
    """Plain lines, one every few seconds."""

    every_s = LOG_S

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def draw(self, meter: Meter) -> None:
        """Write the state as a line."""
        self._stream.write(f"{plain(f'distbench: {meter.text}', self._stream)}\n")
        self._stream.flush()

    def hide(self) -> None:
        """Leave the lines as they are."""


class Live:
    """A line of rich that redraws itself, no longer than the terminal is wide."""

    every_s = _LIVE_S

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._bars: Any = None
        self._console: Any = None

    def draw(self, meter: Meter) -> None:
        """Draw the state where it was drawn before."""
        begins = self._bars is None
        if begins:
            self._bars = self._made()
        self._console.width = self._columns()
        wide = self._console.width >= _LEAST_FOR_BAR
        line = meter.text if wide else printable(", ".join(filter(None, (meter.counts, meter.time, meter.what))))
        state = {"total": meter.total or None, "completed": meter.done, "line": line, "wide": wide}
        if begins:
            self._bars.add_task("", **state)
            self._bars.start()
        else:
            self._bars.update(0, **state)
            self._bars.refresh()

    def hide(self) -> None:
        """Erase the line."""
        if self._bars is not None:
            self._bars.stop()
            self._bars = None

    def _made(self) -> Any:
        """Progress bars of rich, which erases them when they stop."""
        from rich.console import Console
        from rich.progress import BarColumn, Progress, Task, TextColumn
        from rich.table import Column
        from rich.text import Text

        class Bar(BarColumn):
            def render(self, task: Task) -> Any:
                return super().render(task) if task.total and task.fields["wide"] else Text("")

        self._console = Console(file=self._stream, force_terminal=True, highlight=False, width=self._columns())
        column = Column(no_wrap=True, overflow="crop", ratio=1)
        line = TextColumn("{task.fields[line]}", markup=False, style="none", table_column=column)
        return Progress(
            Bar(_BAR),
            line,
            console=self._console,
            auto_refresh=False,
            transient=True,
            expand=True,
            redirect_stdout=False,
            redirect_stderr=False,
        )

    def _columns(self) -> int:
        """Width of the terminal; a longer line could not be erased."""
        try:
            return os.get_terminal_size(self._stream.fileno()).columns or _COLUMNS
        except OSError:
            return _COLUMNS


class Progress:
    """Counts finished cases: passed if the case ended as expected, else failed.

    With --verbose each case has a line, and in a log (`each`); else those that did not end as expected, unless no
    ending is (`expected`).
    """

    def __init__(  # noqa: PLR0913 - what is counted, and which lines are printed
        self,
        total: int,
        *,
        what: str = "cases",
        each: bool = True,
        expected: bool = True,
        quiet: bool = False,
        stream: TextIO | None = None,
    ) -> None:
        """Expect `total` cases of the work `what`; `quiet` prints nothing."""
        stream = sys.stderr if stream is None else stream
        self._quiet = quiet
        self._meter = Meter(what, total, stream=stream)
        self._cases = total
        self._each = each and not stream.isatty()
        self._expected = expected
        self._done = self._failed = 0
        self._begun = False

    def take(self, line: Line, *, quiet: bool = False) -> None:
        """Count a finished case; `quiet` for one that an earlier run finished."""
        self._done += 1
        self._meter.before += quiet
        failed = self._expected and not line.as_expected
        self._failed += failed
        self._count()
        spoken = voice() is Voice.VERBOSE or self._each or failed
        if self._is_quiet or quiet or not spoken:
            return
        surprise = "  UNEXPECTED" if failed else ""
        wall = f"{line.timing.wall_s:8.3f} s"
        self._meter.say(f"{self._done:>6}/{self._cases} {line.verdict.value:<16} {wall}  {line.name}{surprise}")

    def give_back(self, *, as_expected: bool) -> None:
        """Uncount a finished case that will be counted again with another ending."""
        self._done -= 1
        self._failed -= self._expected and not as_expected
        self._count()

    def refresh(self, current: str, place: str = "", part: int = 0, parts: int = 0) -> None:
        """Set the case under way, or empty, the stage that it is in, and how much of it is done: `part` of `parts`."""
        if self._is_quiet:
            return
        if current and not self._begun:
            self._meter.restart()  # the start of the ranks says nothing about the pace
            self._begun = True
        if self._cases == 1 and parts > 1:
            self._meter.done, self._meter.total = part, parts
            self._meter.now = place
        else:
            repeat = f"repeat {part}/{parts}" if parts > 1 else ""
            self._meter.now = ", ".join(filter(None, (current if self._cases > 1 else "", place, repeat)))
        self._meter.open()

    @property
    def _is_quiet(self) -> bool:
        return self._quiet or voice() is Voice.QUIET

    def _count(self) -> None:
        self._meter.done = self._done
        self._meter.also = f"{self._failed} failed" if self._failed else ""

    def close(self) -> None:
        """Erase the live line."""
        self._meter.close()
