"""All findings of a case, bounded in size: every rule that fired, and the errors of every arm and stage."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from distbench.errors import Verdict
from distbench.verify.records import ArmError, Finding, Judgement, Observation, Reason

_REASONS_SHOWN = 16
_RANKS_SHOWN = 64


class FindingReport(msgspec.Struct, frozen=True, kw_only=True):
    """One rule that fired: its verdict, the inputs (exact or gaussian; empty where no rank ran), its reasons.

    `reasons` are the first 16; `codes` counts all of them by code.
    """

    verdict: Verdict
    inputs: str
    reasons: list[Reason]
    codes: dict[str, int]


class ErrorReport(msgspec.Struct, frozen=True, kw_only=True):
    """Error of an arm at a stage ("experts" or "combine") against ideal roundings, over all ranks (see `ArmError`).

    `rows` and `nan_rows` are sums; `ratio` holds the lowest and the highest of the ranks, `bias` that of the largest
    magnitude, `worst` and `ideal_worst` the largest. `outside` are the first 64 ranks that are not within their bounds,
    and `allowed` holds the bounds of the first of them, or of the first rank.
    """

    arm: str
    stage: str
    family: str
    rows: int
    nan_rows: int
    ratio: tuple[float, float] | None
    bias: float | None
    worst: float | None
    ideal_worst: float
    allowed: dict[str, float]
    within: bool
    outside: list[int]


def finding_reports(judgement: Judgement) -> list[FindingReport]:
    """Findings of a judgement, the verdict's first; the verdict alone for a case that no rank judged."""
    findings = judgement.findings
    if not findings and judgement.verdict is not Verdict.PASS:
        findings = [Finding(verdict=judgement.verdict, inputs="", reasons=judgement.reasons)]
    return [
        FindingReport(
            verdict=found.verdict,
            inputs=found.inputs,
            reasons=found.reasons[:_REASONS_SHOWN],
            codes=dict(Counter(reason.code for reason in found.reasons)),
        )
        for found in findings
    ]


def codes_behind(verdict: Verdict, findings: Iterable[FindingReport], reasons: Iterable[Reason]) -> set[str]:
    """Codes of all reasons for `verdict`; `reasons` are those of a report that has no findings."""
    listed = [found for found in findings if found.verdict is verdict]
    return {code for found in listed for code in found.codes} if listed else {reason.code for reason in reasons}


def error_reports(records: Iterable[Observation]) -> list[ErrorReport]:
    """Errors of all ranks together, in the order of the first rank's."""
    groups: dict[tuple[str, str, str], list[tuple[int, ArmError]]] = {}
    for record in records:
        for error in record.errors:
            groups.setdefault((error.arm, error.stage, error.family), []).append((record.rank, error))
    return [_together(group) for group in groups.values()]


def _together(group: Sequence[tuple[int, ArmError]]) -> ErrorReport:
    errors = [error for _, error in group]
    outside = [(rank, error) for rank, error in group if not error.within]
    first = outside[0][1] if outside else errors[0]
    ratios = [error.ratio for error in errors if error.ratio is not None]
    biases = [error.bias for error in errors if error.bias is not None]
    worst = [error.worst for error in errors if error.worst is not None]
    return ErrorReport(
        arm=first.arm,
        stage=first.stage,
        family=first.family,
        rows=sum(error.rows for error in errors),
        nan_rows=sum(error.nan_rows for error in errors),
        ratio=(min(ratios), max(ratios)) if ratios else None,
        bias=max(biases, key=abs, default=None),
        worst=max(worst, default=None),
        ideal_worst=max(error.ideal_worst for error in errors),
        allowed=first.allowed,
        within=not outside,
        outside=[rank for rank, _ in outside[:_RANKS_SHOWN]],
    )
