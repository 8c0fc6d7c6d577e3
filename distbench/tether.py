"""Exit on stdin EOF, for launchers that start a command on another node.

A killed launcher sends no signal to the far side, but there ssh and srun close the command's standard input. A launcher
that sends nothing, as from /dev/null, is not followed.
"""

from __future__ import annotations

import os
import signal
import sys
import threading

_BLOCK_BYTES = 4096


def end_with_stdin() -> None:
    """Send this process SIGTERM on stdin EOF, once at least one byte has arrived."""
    threading.Thread(target=_follow, args=(sys.stdin.fileno(),), name="tether", daemon=True).start()


def _follow(descriptor: int) -> None:
    if os.read(descriptor, 1):
        while os.read(descriptor, _BLOCK_BYTES):
            pass
        os.kill(os.getpid(), signal.SIGTERM)
