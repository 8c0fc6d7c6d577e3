"""Finding the rank that stands still, and those that only wait for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from distbench.breadcrumbs import Position
from distbench.errors import Verdict
from distbench.job import Job, stack_path
from distbench.postmortem import Ending
from distbench.process import STOPPED, is_alive, state
from distbench.stage_limits import stage_limit
from distbench.verify.records import Reason

STACKS_SIGNAL = signal.SIGUSR1

_STACKS_WAIT_S = 0.5
_SPY_S = 2.0
# A rank whose main thread stands in one of these files of torch waits for its peers.
_COLLECTIVE = "distributed_c10d.py"


def _none_elsewhere() -> dict[int, str]:
    return {}


def find_hang(
    job: Job, seen: dict[int, Position], stacks_elsewhere: Callable[[], dict[int, str]] = _none_elsewhere
) -> Ending | None:
    """Return the ending where the ranks that are furthest behind have stood still past their stage's limit.

    Ranks that are ahead wait by definition. Where all that are behind entered one stage, the last to enter counts.
    `stacks_elsewhere` asks other nodes for the stacks of their ranks.
    """
    running = _running(seen)
    if len(seen) < job.num_ranks or not running:
        return None
    least = min(at.progress for at in running.values())
    behind = {rank: at for rank, at in running.items() if at.progress == least}
    last = max(behind.values(), key=lambda at: at.since_ns)
    limit = stage_limit(job.entries[last.case_index].case, last.stage_name)
    stood = (time.monotonic_ns() - last.since_ns) / 1e9
    if stood <= limit:
        return None
    stacks = dump_stacks(job, running) | stacks_elsewhere()
    stuck = _stuck(behind, stacks)
    waiting = sorted(running.keys() - stuck)
    ranks = ", ".join(f"rank {rank}" for rank in sorted(stuck))
    message = f"{ranks} stood in {last.place} for {stood:.1f} s, allowed are {limit:.1f} s"
    if waiting:
        message += f"; rank {', '.join(map(str, waiting))} waited for it"
    reasons = [Reason(code="hang", rank=rank, message=message) for rank in sorted(stuck)]
    named = {str(rank): text for rank, text in stacks.items()}
    return Ending(verdict=Verdict.HANG, case_index=last.case_index, reasons=reasons, stacks=named)


def _running(seen: dict[int, Position]) -> dict[int, Position]:
    """Return the ranks that are under way; where all are done, those whose process does not end."""
    under_way = {rank: at for rank, at in seen.items() if at.stage_name != "done"}
    return under_way or {rank: at for rank, at in seen.items() if is_alive(at.pid)}


def _stuck(behind: dict[int, Position], stacks: dict[int, str]) -> set[int]:
    """Of the ranks behind, those that are not themselves waiting in a collective; all of them where all wait."""
    stuck = {
        rank
        for rank, at in behind.items()
        if state(at.pid) == STOPPED or _COLLECTIVE not in stacks.get(rank, _COLLECTIVE)
    }
    return stuck or set(behind)


def dump_stacks(job: Job, running: dict[int, Position]) -> dict[int, str]:
    """Ask every rank of this host for its Python stacks; a stopped one cannot answer."""
    here = {rank: at for rank, at in running.items() if at.pid}
    for at in here.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(at.pid, STACKS_SIGNAL)
    time.sleep(_STACKS_WAIT_S)
    return {rank: _stack(Path(job.out), rank, at.pid) for rank, at in here.items()}


def _stack(out: Path, rank: int, pid: int) -> str:
    with contextlib.suppress(OSError):
        text = stack_path(out, rank).read_text()
        if text:
            return text
    return _spied(pid) or f"no answer; its process is in state {state(pid)} ({STOPPED}: stopped)"


def _spied(pid: int) -> str:
    """Return what py-spy reads from outside, where it is installed and may."""
    spy = shutil.which("py-spy")
    if spy is None:
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = [spy, "dump", "--nonblocking", "--pid", str(pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SPY_S, check=False)  # noqa: S603
        return done.stdout
    return ""
