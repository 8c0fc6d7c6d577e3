"""From what the ranks saw to one verdict: the most fundamental cause wins (docs/verdicts.md)."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from distbench.breadcrumbs import ARMS
from distbench.case import Case
from distbench.errors import Verdict
from distbench.experts.selection import KernelChoice
from distbench.verify.records import (
    NOT_PROVEN,
    ORACLE,
    STAGE_ORDER,
    Divergence,
    Gathered,
    Judgement,
    Observation,
    Question,
    Reason,
)

# Share of a token's largest magnitude: top-k bf16 adds and up to top-k rounded rank rows, 2**-9 each.
TOLERANCE = 2.0**-5

# The same where expert rows are quantised on their way back: up to half a step of e4m3 or E2M1 in each rank's row.
_QUANTISED_TOLERANCE = {"fp8_direct_cast": 2.0**-3, "fp8_blockwise": 2.0**-3, "fp4_blockwise": 2.0**-1}

# The same where weights and intermediate are e4m3: half a step of each, over the few routes of a token.
_FP8_TOLERANCE = 2.0**-3

_DRIFT_PAIRS = ("padded/truncated", "repadded/truncated")
_ARM_ORDER = ARMS[1:]


def judge(question: Question, gathered: Gathered) -> Judgement:
    """Return the verdict of a case whose ranks all reported."""
    first = first_divergence(gathered.observations)
    rules = (_baseline, _nondeterministic, _under_limit, _corrupt, _drift)
    for rule in rules:
        verdict, reasons = rule(question, gathered)
        if reasons:
            return Judgement(verdict, reasons, first)
    return Judgement(Verdict.PASS, _notes(question, gathered), first)


def first_divergence(observations: list[Observation]) -> Divergence | None:
    """Return the first wrong stage of the first wrong arm, on the first rank where it is wrong."""
    found = [divergence for record in observations for divergence in record.divergences]
    return min(found, key=_divergence_order, default=None)


def _divergence_order(divergence: Divergence) -> tuple[int, int, int]:
    """Order by what went wrong first: it leads, and not what came of it."""
    return _ARM_ORDER.index(divergence.arm), STAGE_ORDER.index(divergence.stage), divergence.rank


Finding = tuple[Verdict, list[Reason]]


def tolerance(case: Case) -> float:
    """Return how far a result may be from another that is as good, as a share of the token's largest magnitude."""
    least = _FP8_TOLERANCE if case.dispatch_dtype == "fp8" else TOLERANCE
    return max(_QUANTISED_TOLERANCE.get(case.combine_quant, TOLERANCE), least)


def _baseline(question: Question, gathered: Gathered) -> Finding:
    allowed = tolerance(question.case)
    reasons = [_diverged(found) for found in _divergences(gathered, "padded")]
    oracle = gathered.comparisons.get(f"padded/{ORACLE}")
    if oracle is not None and not oracle.equal and not reasons:
        reasons = [_differs(gathered, f"padded/{ORACLE}")]
    reasons += [
        Reason(
            code="reference",
            rank=record.rank,
            message=f"rank {record.rank}: padded is {_share(record.reference.worst)} of a token's largest magnitude "
            f"away from the float reference, allowed is {allowed:.3g}",
        )
        for record in gathered.observations
        if record.reference is not None and not _close(record.reference.worst, allowed)
    ]
    return Verdict.BASELINE_WRONG, reasons


def _nondeterministic(question: Question, gathered: Gathered) -> Finding:
    proven = any(found.proven and not question.asks_for(found) for found in _divergences(gathered, *_ARM_ORDER))
    again = _again(question, gathered)
    far = not question.short_ranks and not all(once.near for once in again)
    if question.case.numerics == "exact" or proven or far:
        return Verdict.NONDETERMINISTIC, []
    kernel = gathered.observations[0].kernels["padded"]
    reasons = [
        Reason(
            code=f"{arm}-differs",
            message=f"{arm} differs from padded in {_rows(gathered, arm)} expert rows and in "
            f"{_extent(gathered, f'padded/{arm}')}: the same kernel ({kernel['label']}) gave other bits, so bits "
            "cannot be asked of it",
        )
        for arm in _ARM_ORDER[1:]
        if _never_repeats(gathered, arm)
    ]
    reasons += [once.reason for once in again if once.rounding and not once.other_kernel]
    return Verdict.NONDETERMINISTIC, reasons[:1]


def _never_repeats(gathered: Gathered, arm: str) -> bool:
    """Whether an arm shows that the padded arm's kernel gives other bits each time.

    Control does; where that, by chance, has the same bits, so do others with the same kernel if it adds atomically.
    """
    record = gathered.observations[0]
    comparison = gathered.comparisons.get(f"padded/{arm}")
    if comparison is None or (comparison.equal and not _rows(gathered, arm)):
        return False
    return arm == "control" or (adds_atomically(record.kernels[arm]) and not _other_kernel(record, arm))


def adds_atomically(kernel: dict[str, Any]) -> bool:
    """Whether a kernel, as a record tells of it, gives other bits each time where sums are rounded."""
    return bool(kernel.get("stage2_mode") == "atomic")


class _Again(NamedTuple):
    """An arm's kernel that gave other bits than before, where it ran again on one rank: timed, or in a graph's replay.

    `near`: within the tolerance. `rounding`: the order of additions explains it. `other_kernel`: than the padded arm's.
    """

    reason: Reason
    near: bool
    rounding: bool
    other_kernel: bool


def _again(question: Question, gathered: Gathered) -> list[_Again]:
    """Return what ran again and gave other bits; replays that are wrong are divergences, and not among them."""
    found = []
    for record in gathered.observations:
        for arm, timed in record.timed.items():
            if not timed.last.equal:
                message = (
                    f"rank {record.rank}: the last timed iteration of {arm} differs from its checked pass in "
                    f"{timed.last.differing_tokens} tokens"
                )
                near = _close(timed.drift, tolerance(question.case))
                found.append(_once(question, record, arm, Reason(code="timed-differs", message=message), near=near))
        rows = sum(replay.near for replay in record.replays)
        if rows:
            message = f"rank {record.rank}: replays of the graph differ from eager experts in {rows} rows"
            arm = [*record.kernels][-1]
            found.append(_once(question, record, arm, Reason(code="replay-differs", message=message), near=True))
    return found


def _once(question: Question, record: Observation, arm: str, reason: Reason, *, near: bool) -> _Again:
    """Judge one of these: exact inputs, and kernels that do not add atomically, have to repeat their bits."""
    kernel = record.kernels[arm]
    rounding = near and question.case.numerics != "exact" and adds_atomically(kernel)
    order = f", within tolerance: its kernel ({kernel['label']}) adds in another order each time" if rounding else ""
    said = msgspec.structs.replace(reason, rank=record.rank, message=reason.message + order)
    return _Again(said, near, rounding, _other_kernel(record, arm))


def _rows(gathered: Gathered, arm: str) -> int:
    """Return how many expert rows of an arm have other bits than the padded arm's."""
    return sum(found.rows for found in _divergences(gathered, arm) if not found.proven)


def _under_limit(question: Question, gathered: Gathered) -> Finding:
    if question.case.policy == "guard" or not question.short_ranks:
        return Verdict.UNDER_LIMIT, []
    recv = question.traffic.total_recv
    consequence = "refused on all ranks" if question.refused else "cut all the same"
    advice = (
        f"a limit of {question.proof.bound} is proven for any routing of these token counts, "
        f"{question.traffic.max_recv} is enough for this batch only"
    )
    reasons = [
        Reason(
            code="limit-below-total-recv",
            rank=rank,
            message=f"rank {rank} receives {recv[rank]} rows, the limit keeps {question.limit}: "
            f"{recv[rank] - (question.limit or 0)} lost, {consequence}; {advice}",
        )
        for rank in question.short_ranks
    ]
    if not question.refused:
        damaged = gathered.comparisons["padded/truncated"]
        message = f"truncated differs from padded in {damaged.differing_tokens} tokens"
        reasons.append(Reason(code="damage", message=message))
    return Verdict.UNDER_LIMIT, reasons


def _corrupt(question: Question, gathered: Gathered) -> Finding:
    explained = _may_drift(question, gathered)
    found = [one for one in _divergences(gathered, *_ARM_ORDER[1:]) if not (explained and _is_drift(one))]
    reasons = [_diverged(one) for one in sorted(found, key=lambda one: not one.proven)]
    reasons += [once.reason for once in _again(question, gathered) if not once.rounding]
    for pair, comparison in gathered.comparisons.items():
        if not comparison.equal and not (explained and pair in _DRIFT_PAIRS):
            reasons.append(_differs(gathered, pair))
    reasons += [
        Reason(code="disputed", rank=rank, message=f"rank {rank} and rank 0 disagree on which of its tokens differ")
        for rank in gathered.disputed
    ]
    return Verdict.CORRUPT, reasons


def _drift(question: Question, gathered: Gathered) -> Finding:
    if question.case.require == "tolerance":
        return Verdict.DRIFT, []
    return Verdict.DRIFT, _drifted(question, gathered)


def _notes(question: Question, gathered: Gathered) -> list[Reason]:
    notes = _drifted(question, gathered)
    if question.short_ranks:
        ranks = ", ".join(str(rank) for rank in question.short_ranks)
        message = f"policy guard raised the limit of {question.limit} rows on rank {ranks}"
        notes.append(Reason(code="guarded", message=message))
    if question.proof.status == "this batch" and question.case.policy != "guard":
        message = (
            f"not proven for other routings: the limit keeps {question.limit} rows, a rank receives up to "
            f"{question.proof.bound} under another routing of these token counts ({question.proof.formula})"
        )
        notes.append(Reason(code=NOT_PROVEN, message=message))
    return notes


def _divergences(gathered: Gathered, *arms: str) -> list[Divergence]:
    """Return the divergences of some arms, that which went wrong first in front."""
    found = [one for record in gathered.observations for one in record.divergences if one.arm in arms]
    return sorted(found, key=_divergence_order)


def _may_drift(question: Question, gathered: Gathered) -> bool:
    """Only another kernel may give other bits, only where inputs are not exact, and only within the tolerance."""
    records = gathered.observations
    if question.case.numerics == "exact" or "truncated" not in records[0].kernels:
        return False
    return any(_other_kernel(record, "truncated") for record in records) and all(
        _close(record.drift, tolerance(question.case)) for record in records
    )


def is_noise(gathered: Gathered, found: Divergence) -> bool:
    """Whether other bits are what a kernel does: another than the padded arm's, or one that never repeats its bits."""
    if found.proven:
        return False
    record = next(record for record in gathered.observations if record.rank == found.rank)
    differs = any(_never_repeats(gathered, arm) for arm in _ARM_ORDER[1:])
    return differs or _other_kernel(record, found.arm)


def _other_kernel(record: Observation, arm: str) -> bool:
    padded, other = (msgspec.convert(record.kernels[name], KernelChoice) for name in ("padded", arm))
    return not padded.same_kernel(other)


def _is_drift(found: Divergence) -> bool:
    return found.arm == "truncated" and found.against == "padded"


def _close(error: float | None, allowed: float) -> bool:
    return error is not None and error <= allowed


def _share(error: float | None) -> str:
    return "NaN" if error is None else f"{error:.3g}"


def _diverged(found: Divergence) -> Reason:
    return Reason(code=f"{found.stage}-differs", rank=found.rank, message=str(found), stage=found.stage)


def _differs(gathered: Gathered, pair: str) -> Reason:
    first, second = pair.split("/")
    listed = gathered.differing[pair]
    rank = listed[0][0] if listed else None
    start = f", first token {listed[0][1]} of rank {rank}" if listed else ""
    message = f"{second} differs from {first} in {_extent(gathered, pair)}{start}"
    return Reason(code="bits-differ", rank=rank, message=message)


def _drifted(question: Question, gathered: Gathered) -> list[Reason]:
    """Say how truncated differs from padded, in tokens or only in expert rows, and where its kernel ran again."""
    again = [once.reason for once in _again(question, gathered) if once.rounding]
    rows = _rows(gathered, "truncated")
    comparison = gathered.comparisons.get("padded/truncated")
    if not rows and (comparison is None or comparison.equal):
        return again
    kernels: dict[str, Any] = gathered.observations[0].kernels
    message = (
        f"no row lost, another kernel ({kernels['padded']['label']} → {kernels['truncated']['label']}), other bits in "
        f"{rows} expert rows and in {_extent(gathered, 'padded/truncated')}, within tolerance"
    )
    return [Reason(code="kernel-drift", message=message), *again]


def _extent(gathered: Gathered, pair: str) -> str:
    found = gathered.comparisons[pair]
    return f"{found.differing_tokens} tokens ({found.differing_elements} elements, at most {found.max_ulp} ulp)"
