"""Attribution of a hang: the rank that stands still, as opposed to ranks that only wait for it."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from pathlib import Path

from distbench.case.contract import unreturned
from distbench.case.stages import Stage
from distbench.case.timeouts import stage_limit
from distbench.distributed.flight_recorder import from_stacks, late_ranks
from distbench.distributed.heartbeat import Position
from distbench.errors import Verdict
from distbench.launcher.job import Job, stack_path
from distbench.launcher.postmortem import LaunchFailure
from distbench.utils.process import STOPPED, is_alive, state
from distbench.utils.signals import STACKS_SIGNAL
from distbench.verify.records import Reason

_STACKS_WAIT_S = 0.5
_SPY_S = 2.0
# Ranks are forked at nearly the same time, but the first launch, and other nodes, also have to load torch.
_LOADING_S = 60.0


def _none_elsewhere() -> dict[int, str]:
    return {}


def find_hang(
    job: Job,
    seen: dict[int, Position],
    launched_ns: int,
    stacks_elsewhere: Callable[[], dict[int, str]] = _none_elsewhere,
) -> LaunchFailure | None:
    """The ending where the ranks furthest behind have stood still past their stage's limit; else None.

    Ranks are compared by case, by stage, and by the collectives that they have entered: those ahead wait for those
    behind. Of ranks equally far, the last to enter the stage counts, and ranks whose heartbeat declares a wait are not
    to blame. Where all wait, NCCL's flight recorder may show whose device is late. A rank that has not begun is behind
    all others.

    `launched_ns` is the launch's start on the monotonic clock. `stacks_elsewhere` requests the stacks of other nodes'
    ranks. A hang after the last case is attributed to no case.
    """
    missing = [rank for rank in range(job.num_ranks) if rank not in seen]
    if missing:
        return _never_began(job, missing, seen, launched_ns)
    running = _running(seen)
    if not running:
        return None
    silent = _silent(running)
    if silent is not None:
        return _no_signal(job, silent, running, stacks_elsewhere)
    least = min(at.progress for at in running.values())
    behind = {rank: at for rank, at in running.items() if at.progress == least}
    last = max(behind.values(), key=lambda at: at.since_ns)
    over = last.stage_name == Stage.DONE or last.case_index >= len(job.entries)
    limit = stage_limit(job.entries[-1 if over else last.case_index].case, last.stage_name)
    stood = _seconds_since(last.since_ns)
    if stood <= limit:
        return None
    stacks = dump_stacks(job, running) | stacks_elsewhere()
    stuck, late = _stuck(behind, stacks)
    case_index = None if over else last.case_index
    rule = "" if over else unreturned(job.entries[last.case_index].case, last.stage_name)
    told = f"stood in {last.place} for {stood:.1f} s, allowed are {limit:.1f} s{rule}{late}"
    others = {rank: at for rank, at in running.items() if rank not in stuck}
    return _hang(stuck, others, told, stacks, case_index, last.stage_name)


def _silent(running: dict[int, Position]) -> int | None:
    """The rank that sent no signal: the one that the first device to give up has waited for; None for none.

    A rank that sent none may itself have given up in a later stage, for a rank that waits for it.
    """
    given_up = [at for at in running.values() if at.missing]
    return min(given_up, key=lambda at: at.progress).missing - 1 if given_up else None


def _no_signal(
    job: Job, silent: int, running: dict[int, Position], stacks_elsewhere: Callable[[], dict[int, str]]
) -> LaunchFailure:
    first = min((at for at in running.values() if at.missing), key=lambda at: at.progress)
    limit = stage_limit(job.entries[first.case_index].case, first.stage_name)
    told = f"sent no signal in {first.place}: devices of other ranks gave up waiting, allowed are {limit:.1f} s"
    others = {rank: at for rank, at in running.items() if rank != silent and at.missing - 1 == silent}
    stacks = dump_stacks(job, running) | stacks_elsewhere()
    return _hang({silent}, others, told, stacks, first.case_index, first.stage_name)


def _never_began(job: Job, missing: list[int], seen: dict[int, Position], launched_ns: int) -> LaunchFailure | None:
    """The ending where ranks have left no heartbeat while the others wait for them to join, or where none has."""
    limit = stage_limit(job.entries[0].case, Stage.START)
    if not seen or job.layout is not None:
        limit += _LOADING_S
    stood = _seconds_since(max((at.since_ns for at in seen.values()), default=launched_ns))
    if stood <= limit:
        return None
    told = f"had not begun {stood:.1f} s after {'the others' if seen else 'the launch'}, allowed are {limit:.1f} s"
    return _hang(missing, seen, told, dump_stacks(job, seen), 0, Stage.START)


def _hang(  # noqa: PLR0913 - the ranks that stood, and those that waited
    stuck: Collection[int],
    others: Mapping[int, Position],
    told: str,
    stacks: dict[int, str],
    case_index: int | None,
    stage: str,
) -> LaunchFailure:
    message = f"{', '.join(f'rank {rank}' for rank in sorted(stuck))} {told}"
    if others:
        message += f"; rank {', '.join(map(str, sorted(others)))} waited for it{_where_they_wait(others)}"
    reasons = [Reason(code="hang", rank=rank, message=message, stage=stage) for rank in sorted(stuck)]
    named = {str(rank): text for rank, text in stacks.items()}
    return LaunchFailure(verdict=Verdict.HANG, case_index=case_index, reasons=reasons, stacks=named)


def _where_they_wait(others: Mapping[int, Position]) -> str:
    """Common wait of most ranks, by their heartbeats: on a device, the last collective they entered."""
    waits = [at.collective if at.collective and at.device >= 0 else at.waits_for for at in others.values()]
    ((most, _),) = Counter(waits).most_common(1)
    return f" in {most}" if most else ""


def _seconds_since(moment_ns: int) -> float:
    return (time.monotonic_ns() - moment_ns) / 1e9


def _running(seen: dict[int, Position]) -> dict[int, Position]:
    """The ranks under way; where all are done, those whose process does not end."""
    under_way = {rank: at for rank, at in seen.items() if at.stage_name != Stage.DONE}
    return under_way or {rank: at for rank, at in seen.items() if is_alive(at.pid)}


def _stuck(behind: dict[int, Position], stacks: dict[int, str]) -> tuple[set[int], str]:
    """Of the ranks behind, those to blame, and the flight recorder's evidence.

    A rank is to blame if it is stopped or declares no wait. Where no rank declares one, or all do, the ranks whose
    devices the recorders show as late are to blame; all of them where the recorders show no difference.
    """
    stuck = {rank for rank, at in behind.items() if state(at.pid) == STOPPED or not at.waiting}
    if stuck and stuck != behind.keys():
        return stuck, ""
    recorded = {rank: from_stacks(stacks.get(rank, "")) for rank in behind}
    late = late_ranks(recorded) if all(recorded.values()) else None
    return (set(behind), "") if late is None else (late.ranks, f"; its device {late.told}")


def dump_stacks(job: Job, running: dict[int, Position]) -> dict[int, str]:
    """Request Python stacks from every rank of this host; a stopped rank cannot answer."""
    here = {rank: at for rank, at in running.items() if at.pid}
    for at in here.values():
        with contextlib.suppress(ProcessLookupError):
            os.kill(at.pid, STACKS_SIGNAL)
    time.sleep(_STACKS_WAIT_S)
    return {rank: _stack(Path(job.out), rank, at.pid) for rank, at in here.items()}


def _stack(out: Path, rank: int, pid: int) -> str:
    with contextlib.suppress(OSError):
        text = stack_path(out, rank).read_text(encoding="utf-8", errors="replace")
        if text:
            return text
    return _spied(pid) or f"no answer; its process is in state {state(pid)} ({STOPPED}: stopped)"


def _spied(pid: int) -> str:
    """Stacks read from outside by py-spy, where it is installed and permitted."""
    spy = shutil.which("py-spy")
    if spy is None:
        return ""
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = [spy, "dump", "--nonblocking", "--pid", str(pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SPY_S, check=False)  # noqa: S603
        return done.stdout
    return ""
