"""Post-mortem of ranks that ended early: from their heartbeats and failure files to a verdict."""

from __future__ import annotations

import contextlib
from pathlib import Path

import msgspec

from distbench.case.contract import unreturned
from distbench.case.entry import Entry
from distbench.case.stages import Arm, Stage
from distbench.distributed.heartbeat import Position, is_whole, read_position
from distbench.errors import DiskFull, LaunchFailed, ResultsLost, Verdict
from distbench.launcher.job import Job, Machine, RankFailure, failure_path, heartbeat_path, machine_path, ranks_folder
from distbench.verify.records import Judgement, Outcome, Reason


class LaunchFailure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a launch ended early: the verdict, the case in flight, and the known state of the ranks.

    `case_index` is None where all cases had been done. `last` says that no further launch can be made.
    """

    verdict: Verdict
    case_index: int | None
    reasons: list[Reason]
    stacks: dict[str, str] = {}
    last: bool = False


class Exit(msgspec.Struct, frozen=True):
    """End of a rank's process, as the agent saw it: a signal's name, or an exit code."""

    rank: int
    how: str


def explain_fault(job: Job, first_exit: Exit | None) -> LaunchFailure:
    """Name the rank that ended a launch.

    In this order: the earliest exception of a rank's own; a collective that timed out, attributed to the ranks furthest
    behind; the process that died first, if it left no failure file; a silent rank whose peers report that they lost
    one; the ranks furthest behind, where all are silent; an exception of a rank that lost its peer. `first_exit` is
    None where no supervisor saw the processes end.

    Raises:
        LaunchFailed: no rank had begun. The message names the first process that ended, if one was seen.
        DiskFull: a rank had no room for its results.
        ResultsLost: a rank could not write them for another reason, or the ranks' files were removed.

    """
    out = Path(job.out)
    if not ranks_folder(out).is_dir():
        message = f"{ranks_folder(out)}: removed while ranks ran"
        raise ResultsLost(message)
    failures = [failure for rank in range(job.num_ranks) if (failure := _failure(out, rank)) is not None]
    if not failures and not positions(job):
        _refuse_cut_heartbeats(job)
        raise LaunchFailed(_never_began(job, first_exit))
    _refuse_lost_results(failures)
    own = [failure for failure in failures if not failure.echo]
    raised = [failure for failure in own if not failure.timeout]
    if raised:
        return _raised(job, min(raised, key=lambda failure: failure.position.since_ns))
    if own:
        return _timed_out(job, own)
    silent = _left_silently(job, out, {failure.rank for failure in failures})
    if first_exit is not None and first_exit.rank in silent:
        return _died(job, first_exit, silent[first_exit.rank])
    if silent:
        told = failures or len(silent) == 1
        return _left_no_word(job, silent, failures) if told else _all_left_no_word(job, silent)
    if failures:
        return _raised(job, min(failures, key=lambda failure: failure.position.since_ns))
    return _after_all(first_exit)


def outcome_of(ending: LaunchFailure, entry: Entry) -> Outcome:
    """Outcome of the case on which a launch ended."""
    return Outcome(entry.case, Judgement(ending.verdict, ending.reasons, None), stacks=ending.stacks)


def machines(out: Path, num_ranks: int) -> dict[int, Machine]:
    """Location of each rank, by rank; ranks that had not joined are missing."""
    found = {}
    for rank in range(num_ranks):
        with contextlib.suppress(OSError, msgspec.DecodeError):
            found[rank] = msgspec.json.decode(machine_path(out, rank).read_bytes(), type=Machine)
    return found


def positions(job: Job) -> dict[int, Position]:
    """Last known position of each rank, by rank; ranks that never began are missing."""
    found = {rank: read_position(heartbeat_path(Path(job.out), rank)) for rank in range(job.num_ranks)}
    return {rank: position for rank, position in found.items() if position is not None}


def _raised(job: Job, failure: RankFailure) -> LaunchFailure:
    code = "baseline-fault" if failure.position.arm_name == Arm.PADDED else "rank-fault"
    told = str(failure) + _whose(failure.position)
    reason = Reason(code=code, rank=failure.rank, message=told, stage=failure.position.stage_name)
    stacks = {str(failure.rank): failure.traceback}
    return _ending(job, failure.position, reason, stacks)


def _timed_out(job: Job, waited: list[RankFailure]) -> LaunchFailure:
    seen = positions(job)
    absent = [rank for rank in range(job.num_ranks) if rank not in seen]
    waiting = {failure.rank: failure.position for failure in waited}
    furthest = max(at.progress for at in waiting.values())
    others = {rank: at for rank, at in seen.items() if rank not in waiting and at.progress <= furthest} or waiting
    late = min(others.values(), key=lambda at: at.progress)
    behind = absent or [rank for rank, at in sorted(others.items()) if at.progress == late.progress]
    stood = "never began" if absent else f"stood in {late.place}"
    message = (
        f"rank {', '.join(map(str, behind))} {stood}; rank {', '.join(map(str, waiting))} waited until the collective "
        "timed out"
    )
    stacks = {str(failure.rank): failure.traceback for failure in waited}
    index = min(late.case_index, len(job.entries) - 1)
    stage = Stage.START if absent else late.stage_name
    reasons = [Reason(code="hang", rank=rank, message=message, stage=stage) for rank in behind]
    return LaunchFailure(verdict=Verdict.HANG, case_index=index, reasons=reasons, stacks=stacks)


def _died(job: Job, end: Exit, position: Position | None) -> LaunchFailure:
    return _lost(job, end.rank, f"ended by {end.how}", position)


def _left_no_word(job: Job, silent: dict[int, Position | None], failures: list[RankFailure]) -> LaunchFailure:
    """The ending where peers report a lost rank, or had finished: the earliest silent rank is to blame.

    Ranks that waited for a later case than any peer reports were outside the group.
    """
    reached = max((failure.position.case_index for failure in failures), default=len(job.entries))
    inside = {rank: at for rank, at in silent.items() if at is None or at.case_index <= reached} or silent
    rank = min(inside, key=lambda one: _since(inside[one]))
    return _lost(job, rank, "ended without an error message", silent[rank])


def _lost(job: Job, rank: int, how: str, position: Position | None) -> LaunchFailure:
    place = "before its first stage" if position is None else f"in {position.place}{_whose(position)}"
    baseline = position is not None and position.arm_name == Arm.PADDED
    code = "baseline-fault" if baseline else "rank-fault"
    rule = "" if position is None else _rule(job, position)
    reason = Reason(code=code, rank=rank, message=f"rank {rank} {how} {place}{rule}", stage=_stage(position))
    return _ending(job, position, reason, {})


def _rule(job: Job, position: Position) -> str:
    """Rule that a plugin breaks in whose call a rank ended."""
    entries = job.entries[position.case_index : position.case_index + 1]
    return "".join(unreturned(entry.case, position.stage_name) for entry in entries)


def _all_left_no_word(job: Job, silent: dict[int, Position | None]) -> LaunchFailure:
    """The ending where all ranks were killed from outside, or with a node: those behind held up the others."""
    least = min(_progress(at) for at in silent.values())
    behind = [rank for rank, at in silent.items() if _progress(at) == least]
    ahead = [rank for rank in silent if rank not in behind]
    last = silent[behind[0]]
    place = "before its first stage" if last is None else f"in {last.place}"
    names = ", ".join(map(str, behind))
    if not ahead:
        told = f"rank {names} ended without an error message {place}, none behind another"
        reason = Reason(code="rank-fault", message=told, stage=_stage(last))
        return _ending(job, last, reason, {})
    message = (
        f"rank {names} was behind {place}, rank {', '.join(map(str, ahead))} waited; all ended without an error message"
    )
    reasons = [Reason(code="hang", rank=rank, message=message, stage=_stage(last)) for rank in behind]
    return msgspec.structs.replace(_ending(job, last, reasons[0], {}), verdict=Verdict.HANG, reasons=reasons)


def _after_all(first_exit: Exit | None) -> LaunchFailure:
    how = f"rank {first_exit.rank} ended by {first_exit.how}" if first_exit else "the launch failed"
    reason = Reason(
        code="rank-fault", rank=first_exit.rank if first_exit else None, message=f"{how} after all cases had been done"
    )
    return LaunchFailure(verdict=Verdict.RANK_FAULT, case_index=None, reasons=[reason])


def _refuse_cut_heartbeats(job: Job) -> None:
    """Refuse heartbeat files that are no longer whole: the ranks that have them mapped are killed by SIGBUS."""
    paths = [heartbeat_path(Path(job.out), rank) for rank in range(job.num_ranks)]
    cut = next((path for path in paths if path.exists() and not is_whole(path)), None)
    if cut is not None:
        message = f"{cut}: the heartbeat was cut while its rank ran; let nothing else write to {cut.parent}"
        raise ResultsLost(message)


def _never_began(job: Job, first_exit: Exit | None) -> str:
    output = "standard error of its node" if job.supervised else "the output of the launcher that started it"
    if first_exit is None:
        how = (
            f"none of {job.num_ranks} left a heartbeat or an exception in {ranks_folder(Path(job.out))}, and their "
            f"exit codes are unknown; anything a rank printed is on {output}, a kill in the kernel's log"
        )
    else:
        how = f"rank {first_exit.rank} ended by {first_exit.how}; anything it printed is on {output}"
    return f"the ranks ended before any of them had begun; {how}; distbench doctor looks at this node"


def _refuse_lost_results(failures: list[RankFailure]) -> None:
    for failure in failures:
        if failure.disk_full:
            raise DiskFull(str(failure))
        if failure.results_lost:
            raise ResultsLost(str(failure))


def _ending(job: Job, position: Position | None, reason: Reason, stacks: dict[str, str]) -> LaunchFailure:
    case_index = min(position.case_index if position else 0, len(job.entries) - 1)
    return LaunchFailure(verdict=Verdict.RANK_FAULT, case_index=case_index, reasons=[reason], stacks=stacks)


def _stage(position: Position | None) -> str:
    return "" if position is None else position.stage_name


def _whose(position: Position) -> str:
    return " (the baseline's own arm)" if position.arm_name == Arm.PADDED else ""


def _failure(out: Path, rank: int) -> RankFailure | None:
    try:
        return msgspec.json.decode(failure_path(out, rank).read_bytes(), type=RankFailure)
    except (OSError, msgspec.DecodeError):
        return None


def _left_silently(job: Job, out: Path, spoke: set[int]) -> dict[int, Position | None]:
    """Ranks that neither finished nor left a failure file, with their last position."""
    seen = {rank: read_position(heartbeat_path(out, rank)) for rank in range(job.num_ranks) if rank not in spoke}
    return {rank: at for rank, at in seen.items() if at is None or at.stage_name != Stage.DONE}


def _since(position: Position | None) -> int:
    return position.since_ns if position else 0


def _progress(position: Position | None) -> tuple[int, int]:
    """Case and stage: ranks ended at the same moment may have entered different numbers of collectives."""
    return position.progress[:2] if position else (-1, -1)
