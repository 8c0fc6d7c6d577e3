"""The helper processes of multiprocessing: the fork server, from which ranks are forked, and the resource tracker.

A helper that is stopped by SIGSTOP holds up whoever waits for it without a limit: torchrun's agent for the ends of its
ranks, the interpreter's own end for the tracker.
"""

from __future__ import annotations

import contextlib
import os
import signal
from multiprocessing import forkserver, resource_tracker

from distbench.process import STOPPED, state


def resume_helpers() -> None:
    """Let helpers that are stopped go on."""
    for pid in filter(None, (_fork_server(), _tracker())):
        if state(pid) == STOPPED:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)


def end_fork_server() -> None:
    """Kill the fork server, and with it the ranks that are left: whoever waits for their ends hears of them."""
    pid = _fork_server()
    if pid is not None:
        with contextlib.suppress(OSError):
            os.kill(pid, signal.SIGKILL)


def _fork_server() -> int | None:
    pid: int | None = getattr(vars(forkserver)["_forkserver"], "_forkserver_pid", None)
    return pid


def _tracker() -> int | None:
    pid: int | None = getattr(vars(resource_tracker)["_resource_tracker"], "_pid", None)
    return pid
