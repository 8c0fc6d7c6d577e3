"""Variants of a case, run in as few launches as possible, and the signature that tells failures apart."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec

from distbench.case.entry import Entry
from distbench.case.identity import case_hash
from distbench.case.resolve import FLAGS, Layer, resolve_case
from distbench.case.spec import DERIVED_KEYS, Case
from distbench.case.timeouts import parse_stage_timeouts
from distbench.errors import InvalidCase, Unsupported, Verdict
from distbench.launcher.campaign import Campaign, Rules
from distbench.launcher.memory import check_memory
from distbench.launcher.preflight import check_case
from distbench.launcher.rank_pool import StandingRanks
from distbench.report.journal import read_reports, replace_results
from distbench.report.progress import Progress
from distbench.report.schema import Report
from distbench.verify.records import SEVERAL

HANG_S = 5.0
_SUITE, _TRIAL = "distbench trials", "trial "


class Signature(msgspec.Struct, frozen=True):
    """Identity of a failure: the verdict, the first wrong stage, and the most certain cause, or all of several.

    Where no stage was judged (a lost rank, a refused case) the first reason's stage and code stand for stage and cause.
    """

    verdict: Verdict
    stage: str
    cause: str

    def __str__(self) -> str:
        """The signature in a few words."""
        return ", ".join(filter(None, [self.verdict.value, self.stage, self.cause]))


def signature(report: Report) -> Signature:
    """Signature of a report's ending."""
    stage = report.first_divergence.stage if report.first_divergence else ""
    causes = [found.cause for found in report.diagnosis]
    cause = causes[0] if causes else ""
    if SEVERAL in causes:
        cause = f"{SEVERAL}: {'; '.join(sorted(found.cause for found in report.diagnosis if found.stage))}"
    if not cause and report.verdict is not Verdict.PASS and report.reasons:
        stage, cause = stage or report.reasons[0].stage, report.reasons[0].code
    return Signature(report.verdict, stage, cause)


class Lab:
    """Runs cases in one folder and remembers how each ended: no case runs twice.

    All runs share one launch, as long as no rank is lost; when the context ends, no rank is left.
    """

    def __init__(self, out: Path) -> None:
        """Start with an empty journal in `out`, which the caller holds.

        Raises:
            InvalidCase: it holds results of anything but trials.

        """
        self._out = out
        self._reports: dict[str, Report] = {}
        self._ranks = StandingRanks()
        self.work = "cases"
        """What the cases are run for, as progress names it."""
        replace_results(out, _SUITE, lambda name: name.startswith(_TRIAL))

    def __enter__(self) -> Lab:  # noqa: PYI034 - Self comes with Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self._ranks.close()

    @property
    def launches(self) -> int:
        """Number of launches so far."""
        return self._ranks.launches

    @property
    def cases(self) -> int:
        """Number of cases run so far."""
        return len(self._reports)

    def run(self, cases: Iterable[Case]) -> list[Report]:
        """Run the new cases, in one launch unless ranks are lost; return the reports of all, in order.

        Raises:
            Interrupted: by SIGINT or SIGTERM.
            Unsupported: a case needs more memory than is available.

        """
        wanted = list(cases)
        self._launch(wanted, max_faults=len(wanted) + 1)
        return [self._reports[case_hash(case)] for case in wanted]

    def first(self, cases: Iterable[Case], wanted: Callable[[Report], bool]) -> Case | None:
        """First case whose report is wanted, or None; few cases after it run, 1, 2, 4, … at a time.

        Raises:
            Interrupted: by SIGINT or SIGTERM.
            Unsupported: a case needs more memory than is available.

        """
        left = list(cases)
        few = 1
        while left:
            self._launch(left[:few], max_faults=1)
            for case in left[:few]:
                report = self._reports.get(case_hash(case))
                if report is not None and wanted(report):
                    return case
            left = [case for case in left if case_hash(case) not in self._reports]
            few *= 2
        return None

    def _launch(self, cases: list[Case], max_faults: int) -> None:
        new = {case_hash(case): case for case in cases if case_hash(case) not in self._reports}
        if not new:
            return
        entries = [
            Entry(name=f"{_TRIAL}{digest[:12]}", case=case, sources={}, suite=_SUITE) for digest, case in new.items()
        ]
        check_memory(entries)
        progress = Progress(len(entries), what=self.work, each=False, expected=False)
        rules = Rules(max_faults=max_faults)
        try:
            Campaign(entries, self._out, rules, progress, launch=self._ranks.run).run()
        finally:
            progress.close()
        self._reports |= {
            report.case["hash"]: report for report in read_reports(self._out) if report.case["hash"] in new
        }


def varied(case: Case, **changes: Any) -> Case:
    """`case` with other values, checked as if flags had them: a flag has named the code that it runs.

    Raises:
        InvalidCase: the values do not fit together.

    """
    values = {key: value for key, value in msgspec.structs.asdict(case).items() if key not in DERIVED_KEYS}
    changed = resolve_case([Layer(FLAGS, values | changes)], None).case
    check_case(changed)
    return changed


def possible(case: Case, **changes: Any) -> list[Case]:
    """The variant as a list of one; empty where these values are invalid."""
    try:
        return [varied(case, **changes)]
    except (InvalidCase, Unsupported):
        return []


def impatient(case: Case) -> Case:
    """`case` with time limits of at most `HANG_S`: each variant of a hanging case takes that long."""
    stages = {stage: min(limit, HANG_S) for stage, limit in parse_stage_timeouts(case.stage_timeouts).items()}
    text = ",".join(f"{stage}={limit:g}" for stage, limit in stages.items())
    return varied(case, timeout=min(case.timeout, HANG_S), stage_timeouts=text)
