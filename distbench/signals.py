"""The signals that end a bench: at once at first, then raised in the main thread; collected while ranks are watched."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

# Ctrl-C, a scheduler that takes the node back, a terminal that was closed.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)
STACKS_SIGNAL = signal.SIGUSR1
"""Asks a rank for its stacks."""


# What has been raised. Where a destructor or a weak reference's callback runs, as in the import system, it gets lost.
_raised: list[int] = []


class Interrupted(BaseException):
    """A signal asked for the end; the ranks are gone. As KeyboardInterrupt, it is no error that a library handles."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def leave(why: Interrupted) -> NoReturn:
    """End this process without tidying up: there is nothing yet."""
    os.write(2, f"distbench: INTERRUPTED: {why}, before anything had begun\n".encode())
    os._exit(why.exit_code)


def leave_by_signals() -> None:
    """Let ENDING_SIGNALS end this process at once, for as long as nothing has begun. nohup keeps its meaning.

    A library that an exception met while it was loaded by half may go on, and crash later.
    """
    for number in _heeded():
        signal.signal(number, _leave)


def raise_signals() -> None:
    """Let ENDING_SIGNALS raise `Interrupted` from now on. nohup keeps its meaning."""
    for number in _heeded():
        signal.signal(number, _raise)


@contextlib.contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Collect ENDING_SIGNALS instead of ending by them; yields the list that they go to. nohup keeps its meaning.

    The list begins with those that were raised before and got lost.
    """
    received = list(_raised)

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


def _leave(number: int, _: FrameType | None) -> None:
    leave(Interrupted(number))


def _raise(number: int, _: FrameType | None) -> None:
    _raised.append(number)
    raise Interrupted(number)
