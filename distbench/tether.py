"""Ending with whoever holds the other end of standard input, as a launcher does that starts a command on another node.

A launcher that is killed takes no signal to the far side, but there ssh and srun close the command's standard input.
One that feeds nothing, as from /dev/null, holds nobody.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

_BLOCK_BYTES = 4096


def end_with_stdin() -> None:
    """Have this process get SIGTERM when its standard input ends, once a byte has come by it."""
    threading.Thread(target=_follow, args=(sys.stdin.fileno(),), name="tether", daemon=True).start()


def _follow(descriptor: int) -> None:
    if os.read(descriptor, 1):
        while os.read(descriptor, _BLOCK_BYTES):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
