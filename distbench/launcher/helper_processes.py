"""The helper processes of multiprocessing: the fork server, which forks the ranks, and the resource tracker.

A helper stopped by SIGSTOP blocks every process that waits for it without a limit: torchrun's agent, which waits for
the ends of its ranks, and the interpreter's exit, which waits for the tracker.
"""

from __future__ import annotations

import contextlib
import os
import signal
from multiprocessing import forkserver, resource_tracker

from distbench.utils.process import STOPPED, state


def resume_helpers() -> None:
    """Continue helpers that are stopped."""
    for pid in filter(None, (_fork_server(), _tracker())):
        if state(pid) == STOPPED:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGCONT)


def end_fork_server() -> None:
    """Kill the fork server, and with it the remaining ranks: a process that waits for their ends is notified."""
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
