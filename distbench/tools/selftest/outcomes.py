"""Outcomes of a self-test: each report compared with the injected fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import msgspec

from distbench.case.stages import Arm
from distbench.errors import Verdict
from distbench.report.journal import read_reports
from distbench.report.schema import Report
from distbench.tools.selftest.cases import DEAD, FaultPlan, FaultTrial
from distbench.verify.records import SEVERAL

RIGHT_SHARE = 0.95


class TrialResult(msgspec.Struct, frozen=True, kw_only=True):
    """Outcome of a trial. `fired`: the fault changed something; `healthy_blamed`: a healthy rank was named."""

    trial: FaultTrial
    verdict: str
    cause: str
    fired: bool
    caught: bool
    right: bool
    healthy_blamed: bool


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """All seeds of one fault together."""

    label: str
    bug: str
    expected: str
    verdicts: str
    diagnosis: str
    seeds: int
    caught: int
    right: int
    healthy_blamed: int


class Outcomes(msgspec.Struct, frozen=True, kw_only=True):
    """The whole self-test: a row for each fault, random cases that did not PASS, and faults that could not be tried.

    `stand_ins` are the stand-ins that replaced packages, `parts` the transport and the experts.
    """

    rows: list[Row]
    clean: int
    false_alarms: list[str]
    missing: int
    not_tried: dict[str, str]
    ranks: int
    parts: list[str]
    stand_ins: list[str]

    @property
    def right_share(self) -> float:
        """Share of faulty cases with the right verdict, first stage and rank."""
        return sum(row.right for row in self.rows) / max(sum(row.seeds for row in self.rows), 1)

    @property
    def passed(self) -> bool:
        """Whether no fault was missed, no healthy rank was blamed, and no clean case raised an alarm."""
        sound = all(row.seeds and row.caught == row.seeds and not row.healthy_blamed for row in self.rows)
        right = bool(self.rows) and self.right_share >= RIGHT_SHARE
        return sound and right and not self.false_alarms and not self.missing


def outcomes(asked: FaultPlan, out: Path) -> Outcomes:
    """Outcomes of the plan `asked`, from the reports in `out`. Faults of missing parts are not tried."""
    by_name = {trial.entry.name: trial for trial in asked.trials}
    results: list[TrialResult] = []
    alarms: list[str] = []
    not_tried = dict(asked.impossible)
    seen = clean = 0
    for report in read_reports(out):
        trial = by_name.get(report.name)
        if trial is None:
            continue
        seen += 1
        if report.verdict is Verdict.UNSUPPORTED:
            not_tried[trial.label or "clean cases, some"] = report.reasons[0].message
        elif trial.label:
            results.append(result_of(trial, report))
        else:
            clean += 1
            alarms += [] if is_clean(report) else [f"{report.verdict.value}: {report.name}"]
    tried = {one.trial.label for one in results}
    labels = dict.fromkeys(one.label for one in asked.trials if one.label in tried or one.label not in not_tried)
    base = asked.trials[0].entry.case
    return Outcomes(
        rows=[_row(label, [one for one in results if one.trial.label == label]) for label in labels if label],
        clean=clean,
        false_alarms=alarms,
        missing=len(asked.trials) - seen,
        not_tried=not_tried,
        ranks=base.ep_size,
        parts=[base.transport, base.experts],
        stand_ins=base.stand_ins,
    )


def is_clean(report: Report) -> bool:
    """Whether a case without a fault ended validly: a kernel that adds atomically need not repeat its bits."""
    if report.verdict is not Verdict.NONDETERMINISTIC:
        return report.verdict is Verdict.PASS
    return any(rank.kernels[Arm.PADDED].get("stage2_mode") == "atomic" for rank in report.ranks)


def result_of(trial: FaultTrial, report: Report) -> TrialResult:
    """Compare one report with the injected fault."""
    hits = {int(rank) for one in report.injected for rank in one.hits}
    died = report.verdict.value in DEAD
    named = _lost_ranks(report) if died else _diagnosed(report)
    stage = trial.stage or next((one.stage for one in report.injected if one.stage), "")
    expected = [(trial.verdict, stage), *([(DEAD[1], trial.guard)] if trial.guard else [])]
    good = report.verdict.value == trial.verdict == Verdict.PASS.value
    guilty = set(trial.ranks) or hits
    return TrialResult(
        trial=trial,
        verdict=report.verdict.value,
        cause="no fault" if good else named.cause,
        fired=died or bool(hits),
        caught=good if trial.verdict == Verdict.PASS.value else not is_clean(report),
        right=good or ((report.verdict.value, named.stage) in expected and named.ranks == guilty),
        healthy_blamed=not good and not named.ranks <= guilty,
    )


class _Named(NamedTuple):
    """The blame of a report: in words, the stage (or that there are several), and ranks."""

    cause: str
    stage: str
    ranks: set[int]


def _lost_ranks(report: Report) -> _Named:
    stages = dict.fromkeys(reason.stage for reason in report.reasons)
    what = report.verdict.value.lower().replace("_", " ")
    ranks = {reason.rank for reason in report.reasons if reason.rank is not None}
    return _Named(f"{what} in {' and '.join(stages)}", "".join(stages), ranks)


def _diagnosed(report: Report) -> _Named:
    named = [one for one in report.diagnosis if one.stage or one.cause == SEVERAL]
    ranks = {rank for one in named for rank in one.ranks}
    if not named:
        return _Named("none", "", ranks)
    return _Named(named[0].cause, named[0].stage or named[0].cause, ranks)


def _row(label: str, results: list[TrialResult]) -> Row:
    fired = [one for one in results if one.fired]
    return Row(
        label=label,
        bug=results[0].trial.bug if results else "",
        expected=_counted(one.trial.verdict for one in fired),
        verdicts=_counted(one.verdict for one in fired),
        diagnosis=next(iter(Counter(one.cause for one in fired if one.right).most_common(1)), ("none right", 0))[0],
        seeds=len(fired),
        caught=sum(one.caught for one in fired),
        right=sum(one.right for one in fired),
        healthy_blamed=sum(one.healthy_blamed for one in fired),
    )


def _counted(words: Iterable[str]) -> str:
    return ", ".join(f"{count} {word}" for word, count in sorted(Counter(words).items()))
