"""What came of a self-test: each report held against the fault that was put in."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from distbench.errors import Verdict
from distbench.report.document import Report
from distbench.report.journal import RESULTS
from distbench.selftest.trials import DEAD, SEVERAL, Trial

RIGHT_SHARE = 0.95


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What came of a trial: `fired` that the fault changed something, `healthy_blamed` that a sound rank was named."""

    trial: Trial
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
    """The whole self-test: a row for each fault, and the random cases that were no PASS."""

    rows: list[Row]
    clean: int
    false_alarms: list[str]
    missing: int

    @property
    def right_share(self) -> float:
        """Share of faulty cases with the right verdict, first stage and rank."""
        return sum(row.right for row in self.rows) / max(sum(row.seeds for row in self.rows), 1)

    @property
    def passed(self) -> bool:
        """Whether nothing slipped through, nobody was blamed wrongly, and no clean case was refused."""
        sound = all(row.seeds and row.caught == row.seeds and not row.healthy_blamed for row in self.rows)
        return sound and self.right_share >= RIGHT_SHARE and not self.false_alarms and not self.missing


def outcomes(asked: Sequence[Trial], out: Path) -> Outcomes:
    """Hold the reports in `out` against what was asked."""
    by_name = {trial.entry.name: trial for trial in asked}
    results: list[Result] = []
    alarms: list[str] = []
    seen = 0
    for report in _reports(out):
        trial = by_name.get(report.name)
        if trial is None:
            continue
        seen += 1
        if trial.label:
            results.append(result_of(trial, report))
        elif report.verdict is not Verdict.PASS:
            alarms.append(f"{report.verdict.value}: {report.name}")
    labels = dict.fromkeys(trial.label for trial in asked if trial.label)
    rows = [_row(label, [one for one in results if one.trial.label == label]) for label in labels]
    clean = sum(not trial.label for trial in asked)
    return Outcomes(rows=rows, clean=clean, false_alarms=alarms, missing=len(asked) - seen)


def _reports(out: Path) -> Iterator[Report]:
    with (out / RESULTS).open("rb") as lines:
        for line in lines:
            yield msgspec.json.decode(line, type=Report)


def result_of(trial: Trial, report: Report) -> Result:
    """Hold one report against the fault that was put in."""
    hits = {int(rank) for one in report.injected for rank in one.hits}
    guilty = set(trial.ranks) or hits
    died = report.verdict.value in DEAD
    fired = died or bool(hits)
    if trial.verdict == Verdict.PASS.value:
        good = report.verdict is Verdict.PASS
        return Result(
            trial=trial,
            verdict=report.verdict.value,
            cause="no fault" if good else report.reasons[0].message,
            fired=fired,
            caught=good,
            right=good,
            healthy_blamed=not good,
        )
    if died:
        reasons = report.reasons
        stages = all(f"{trial.stage} " in f"{reason.message} " for reason in reasons)
        cause = f"{report.verdict.value.lower().replace('_', ' ')} in {trial.stage}" if stages else reasons[0].message
        blamed = {reason.rank for reason in reasons if reason.rank is not None}
    else:
        named = [one for one in report.diagnosis if one.stage or one.cause == SEVERAL]
        cause = named[0].cause if named else "none"
        blamed = {rank for one in named for rank in one.ranks}
        stages = bool(named) and trial.stage in (named[0].stage, named[0].cause)
    return Result(
        trial=trial,
        verdict=report.verdict.value,
        cause=cause,
        fired=fired,
        caught=report.verdict is not Verdict.PASS,
        right=report.verdict.value == trial.verdict and stages and blamed == guilty,
        healthy_blamed=not blamed <= guilty,
    )


def _row(label: str, results: list[Result]) -> Row:
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
