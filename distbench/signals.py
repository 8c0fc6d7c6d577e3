"""The signals that end a bench: one of them is raised in the main thread, or collected while ranks are watched."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType

# Ctrl-C, a scheduler that takes the node back, a terminal that was closed.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)


class Interrupted(Exception):
    """A signal asked for the end; the ranks are gone."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def raise_signals() -> None:
    """Let ENDING_SIGNALS raise `Interrupted` from now on. nohup keeps its meaning."""
    for number in _heeded():
        signal.signal(number, _raise)


@contextlib.contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Collect ENDING_SIGNALS instead of ending by them; yields the list that they go to. nohup keeps its meaning."""
    received: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.getsignal(number) for number in _heeded()}
    for number in before:
        signal.signal(number, note)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _heeded() -> list[signal.Signals]:
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [number for number in ENDING_SIGNALS if not (ignored and number == signal.SIGHUP)]


def _raise(number: int, _: FrameType | None) -> None:
    raise Interrupted(number)
