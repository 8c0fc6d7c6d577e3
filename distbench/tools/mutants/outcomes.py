"""Outcomes of the runs: the mutants detected, by which inputs, and the public rules' decisions on the same outputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import msgspec

from distbench.errors import Verdict
from distbench.faults.mutants.corpus import Mutant
from distbench.faults.mutants.rules import RULES
from distbench.report.journal import read_reports
from distbench.report.schema import Report
from distbench.tools.mutants.plan import NUMERICS, MutantPlan, Run

SHARE = 0.97
"""Share of the corpus that has to be detected."""

_ALARMS = {
    Verdict.BASELINE_WRONG,
    Verdict.CORRUPT,
    Verdict.OVERFLOW,
    Verdict.HANG,
    Verdict.RANK_FAULT,
}
"""Verdicts that say something is wrong with a part. NONDETERMINISTIC and DRIFT may come from a correct kernel."""

Often = Literal["always", "sometimes", "never"]


class Tried(msgspec.Struct, frozen=True, kw_only=True):
    """All runs of one mutant.

    `exact`, `gaussian` and `either` count the runs in which it was detected; `either` counts an exact run and the
    otherwise equal gaussian run as one. `missed` are those that neither detected. `verdicts` are all that occurred.
    `rules` holds for each public rule whether it rejects the outputs in every run.
    """

    name: str
    kind: str
    seam: str
    text: str
    bug: str
    subtle: bool
    equivalent: str
    unseen: str
    exact: Often
    gaussian: Often
    either: Often
    missed: list[str]
    verdicts: list[str]
    rules: dict[str, bool]


class Found(msgspec.Struct, frozen=True, kw_only=True):
    """The whole corpus. `alarms` are runs without a mutant, or with an equivalent one, that ended in an alarm."""

    mutants: list[Tried]
    alarms: list[str]
    missing: list[str]
    left_out: dict[str, str]
    ranks: int
    seeds: int
    parts: list[str]
    stand_ins: list[str]
    share: float = SHARE

    @property
    def broken(self) -> list[Tried]:
        """The mutants that are not equivalents, and so have to be detected."""
        return [one for one in self.mutants if not one.equivalent]

    @property
    def seen(self) -> list[Tried]:
        """Those detected in every run."""
        return [one for one in self.broken if one.either == "always"]

    @property
    def unseen(self) -> list[Tried]:
        """Those not detected in every run."""
        return [one for one in self.broken if one.either != "always"]

    @property
    def seen_share(self) -> float:
        """The share detected in every run."""
        return len(self.seen) / max(len(self.broken), 1)

    @property
    def passed(self) -> bool:
        """Whether enough was detected, nothing alarmed that must not, and all runs left a result."""
        return self.seen_share >= self.share and not self.alarms and not self.missing

    def rejected_by(self, rule: str) -> list[Tried]:
        """Mutants that a public rule rejects in every run in which it was evaluated."""
        return [one for one in self.broken if one.rules.get(rule)]

    @property
    def ruled(self) -> int:
        """Number of mutants that public rules were evaluated on."""
        return sum(bool(one.rules) for one in self.broken)


def found_in(out: Path, asked: MutantPlan, ranks: int, seeds: int, share: float = SHARE) -> Found:
    """Outcomes from the reports in `out` for the plan."""
    reports = {report.name: report for report in read_reports(out)}
    by_mutant: dict[str, list[Run]] = {}
    for run in asked.runs:
        by_mutant.setdefault(run.mutant, []).append(run)
    harmless = {mutant.name for mutant in asked.mutants if mutant.equivalent} | {""}
    base = asked.runs[0].entry.case
    return Found(
        mutants=[_tried(mutant, by_mutant[mutant.name], reports) for mutant in asked.mutants],
        alarms=[
            f"{report.verdict.value}: {report.name}"
            for run in asked.runs
            if run.mutant in harmless and (report := reports.get(run.entry.name)) is not None and alarmed(report)
        ],
        missing=[run.entry.name for run in asked.runs if run.entry.name not in reports],
        left_out=asked.left_out,
        ranks=ranks,
        seeds=seeds,
        parts=[base.transport, base.experts],
        stand_ins=base.stand_ins,
        share=share,
    )


def alarmed(report: Report) -> bool:
    """Whether a report says that something is wrong."""
    return report.verdict in _ALARMS


def _tried(mutant: Mutant, runs: Sequence[Run], reports: Mapping[str, Report]) -> Tried:
    seen: dict[str, dict[tuple[str, str, str, int], bool]] = {numerics: {} for numerics in NUMERICS}
    verdicts: dict[str, None] = {}
    rejected: dict[str, list[bool]] = {rule: [] for rule in RULES}
    for run in runs:
        report = reports.get(run.entry.name)
        seen[run.numerics][run.key] = report is not None and alarmed(report)
        if report is None:
            continue
        verdicts[report.verdict.value] = None
        for one in report.injected:
            for rule, accepted in one.accepted.items():
                rejected[rule].append(not accepted)
    either = {key: any(seen[numerics].get(key, False) for numerics in NUMERICS) for key in seen[NUMERICS[0]]}
    return Tried(
        name=mutant.name,
        kind=mutant.kind,
        seam=mutant.seams[0],
        text=mutant.text,
        bug=mutant.bug,
        subtle=mutant.subtle,
        equivalent=mutant.equivalent,
        unseen=mutant.unseen,
        exact=_often(seen["exact"].values()),
        gaussian=_often(seen["gaussian"].values()),
        either=_often(either.values()),
        missed=[f"{setting}, {arm}, seed {seed}" for (_, setting, arm, seed), one in either.items() if not one],
        verdicts=list(verdicts),
        rules={rule: all(said) for rule, said in rejected.items() if said},
    )


def _often(seen: Iterable[bool]) -> Often:
    counted = list(seen)
    if all(counted):
        return "always"
    return "sometimes" if any(counted) else "never"
