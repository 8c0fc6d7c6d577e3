"""What became of ranks that did not come to an end: from their breadcrumbs and last words to a verdict."""

from __future__ import annotations

from pathlib import Path

import msgspec

from distbench.breadcrumbs import Position, read_position
from distbench.errors import Verdict
from distbench.job import Entry, Job, RankFailure, crumb_path, failure_path
from distbench.verify.records import Judgement, Outcome, Reason


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """Why a launch ended early: the verdict, the case that it falls on, and what is known of the ranks.

    `last` says that no further launch can be made.
    """

    verdict: Verdict
    case_index: int
    reasons: list[Reason]
    stacks: dict[str, str] = {}
    last: bool = False


class Exit(msgspec.Struct, frozen=True):
    """How a rank's process ended, as the agent saw it: a signal's name, or an exit code."""

    rank: int
    how: str


def explain_fault(job: Job, first_exit: Exit | None) -> Ending:
    """Name the rank that ended a launch.

    In this order: the earliest exception of a rank's own; a collective that timed out, which falls on the ranks that
    are furthest behind; the process that died first, where it left no word; a rank that left before it was done; an
    exception of a rank that lost its peer.
    """
    out = Path(job.out)
    failures = [failure for rank in range(job.num_ranks) if (failure := _failure(out, rank)) is not None]
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
        rank = min(silent, key=lambda one: _since(silent[one]))
        return _died(job, Exit(rank, "exit code 0 before it was done"), silent[rank])
    if failures:
        return _raised(job, min(failures, key=lambda failure: failure.position.since_ns))
    reason = Reason(code="launch-failed", message="the ranks ended before any of them began; see the messages above")
    return Ending(verdict=Verdict.RANK_FAULT, case_index=0, reasons=[reason])


def outcome_of(ending: Ending, entry: Entry) -> Outcome:
    """Return the outcome of the case on which a launch ended."""
    return Outcome(entry.case, Judgement(ending.verdict, ending.reasons, None), stacks=ending.stacks)


def positions(job: Job) -> dict[int, Position]:
    """Return where each rank was last seen, by rank; ranks that never began are missing."""
    found = {rank: read_position(crumb_path(Path(job.out), rank)) for rank in range(job.num_ranks)}
    return {rank: position for rank, position in found.items() if position is not None}


def _raised(job: Job, failure: RankFailure) -> Ending:
    code = "baseline-fault" if failure.position.arm_name == "padded" else "rank-fault"
    reason = Reason(code=code, rank=failure.rank, message=str(failure) + _whose(failure.position))
    stacks = {str(failure.rank): failure.traceback}
    return _ending(job, failure.position, reason, stacks)


def _timed_out(job: Job, waited: list[RankFailure]) -> Ending:
    seen = positions(job)
    absent = [rank for rank in range(job.num_ranks) if rank not in seen]
    waiting = {failure.rank: failure.position for failure in waited}
    others = {rank: at for rank, at in seen.items() if rank not in waiting} or waiting
    late = min(others.values(), key=lambda at: at.progress)
    behind = absent or [rank for rank, at in sorted(others.items()) if at.progress == late.progress]
    stood = "never began" if absent else f"stood in {late.place}"
    message = (
        f"rank {', '.join(map(str, behind))} {stood}; rank {', '.join(map(str, waiting))} waited until the collective "
        "timed out"
    )
    stacks = {str(failure.rank): failure.traceback for failure in waited}
    index = min(late.case_index, len(job.entries) - 1)
    reasons = [Reason(code="hang", rank=rank, message=message) for rank in behind]
    return Ending(verdict=Verdict.HANG, case_index=index, reasons=reasons, stacks=stacks)


def _died(job: Job, end: Exit, position: Position | None) -> Ending:
    place = "before its first stage" if position is None else f"in {position.place}{_whose(position)}"
    baseline = position is not None and position.arm_name == "padded"
    message = f"rank {end.rank} ended by {end.how} {place}"
    reason = Reason(code="baseline-fault" if baseline else "rank-fault", rank=end.rank, message=message)
    return _ending(job, position, reason, {})


def _ending(job: Job, position: Position | None, reason: Reason, stacks: dict[str, str]) -> Ending:
    case_index = min(position.case_index if position else 0, len(job.entries) - 1)
    return Ending(verdict=Verdict.RANK_FAULT, case_index=case_index, reasons=[reason], stacks=stacks)


def _whose(position: Position) -> str:
    return " (the baseline's own arm)" if position.arm_name == "padded" else ""


def _failure(out: Path, rank: int) -> RankFailure | None:
    try:
        return msgspec.json.decode(failure_path(out, rank).read_bytes(), type=RankFailure)
    except (OSError, msgspec.DecodeError):
        return None


def _left_silently(job: Job, out: Path, spoke: set[int]) -> dict[int, Position | None]:
    """Return ranks that neither finished nor said why, with their last position."""
    seen = {rank: read_position(crumb_path(out, rank)) for rank in range(job.num_ranks) if rank not in spoke}
    return {rank: at for rank, at in seen.items() if at is None or at.stage_name != "done"}


def _since(position: Position | None) -> int:
    return position.since_ns if position else 0
