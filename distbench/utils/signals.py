"""Signals that end a bench: at once during start-up, then raised in the main thread; collected while ranks run."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

# Ctrl-C, a scheduler that reclaims the node, a terminal that was closed.
ENDING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TERMINAL_SIGNALS = (signal.SIGINT, signal.SIGHUP)
STACKS_SIGNAL = signal.SIGUSR1
"""Requests a rank's stacks."""


# Signals already raised: an exception in a destructor or a weakref callback, as in the import system, is lost.
_raised: list[int] = []


class Interrupted(BaseException):
    """A signal requested the end; no rank is left. Like KeyboardInterrupt, it is no error that a library handles."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.exit_code = 128 + number


def leave(why: Interrupted) -> NoReturn:
    """End this process without cleanup: there is nothing to clean up yet."""
    os.write(2, f"distbench: INTERRUPTED: {why}, before anything had begun\n".encode())
    os._exit(why.exit_code)


def leave_by_signals() -> None:
    """Make ENDING_SIGNALS end this process at once, during start-up only. nohup keeps its effect.

    A library whose import is interrupted by an exception may continue, and crash later.
    """
    for number in _heeded():
        signal.signal(number, _leave)


def raise_signals() -> None:
    """Make ENDING_SIGNALS raise `Interrupted` from now on. nohup keeps its effect."""
    for number in _heeded():
        signal.signal(number, _raise)


@contextlib.contextmanager
def collect_signals() -> Iterator[list[int]]:
    """Collect ENDING_SIGNALS instead of ending; yields the list that they are appended to. nohup keeps its effect.

    The list begins with signals that were raised before and lost.
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


_BLOCK_BYTES = 4096


def end_with_stdin() -> None:
    """Send this process SIGTERM on stdin EOF, once at least one byte has arrived."""
    threading.Thread(target=_follow, args=(sys.stdin.fileno(),), name="end with stdin", daemon=True).start()


def _follow(descriptor: int) -> None:
    if os.read(descriptor, 1):
        while os.read(descriptor, _BLOCK_BYTES):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
