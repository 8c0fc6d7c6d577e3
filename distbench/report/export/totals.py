"""Totals of all results, in memory that grows with their number only: counts, and times by stage."""

from __future__ import annotations

import hashlib
import statistics
from array import array
from collections import Counter

from distbench.case.stages import ARMS, STAGES
from distbench.errors import Verdict
from distbench.report.results import Result, Results

_SHOWN = 50
DISTBENCH = "distbench"
_COMMAND = "distbench "  # results of `run` and `sweep` have the command in place of a suite
_HASH_DIGITS = 12


class Totals:
    """Counts, the time of each arm's stages in each case, and the first cases that did not end as expected."""

    def __init__(self, results: Results) -> None:
        """Iterate over `results` once."""
        self.verdicts: Counter[Verdict] = Counter()
        self.unexpected: Counter[Verdict] = Counter()
        self.limits: Counter[str] = Counter()
        self.shown: list[Result] = []
        self.suites: set[str] = set()
        self.hosts: set[str] = set()
        self.first_host = ""
        self.ended: set[str] = set()
        self.limit_rows = array("q")
        self.max_recv = array("q")
        self.lost_rows = 0
        self.stand_ins: set[str] = set()
        self.plugins: set[str] = set()
        self.wall_s = array("d")
        self.medians_us: dict[tuple[str, str, str], array[float]] = {}
        self._hashes: list[str] = []
        self.missing = results.missing
        self.exit_code = results.exit_code
        summary = results.summary
        if summary is not None and summary.suite:
            self.suites.add(summary.suite)
        for result in results:
            self._add(result)

    @property
    def suite(self) -> str:
        """Name of the suite, or of all suites in the results; DISTBENCH where they name none."""
        return ", ".join(sorted(self.suites)) or DISTBENCH

    @property
    def case_label(self) -> str:
        """12 digits: of the case's hash for `run`, of a digest of all hashes for `sweep`; empty for a suite's results.

        It distinguishes results of one command with other cases.
        """
        if len(self._hashes) < 2:  # noqa: PLR2004 - nothing to combine
            return "".join(self._hashes)[:_HASH_DIGITS]
        return hashlib.sha256("".join(sorted(self._hashes)).encode()).hexdigest()[:_HASH_DIGITS]

    @property
    def cases(self) -> int:
        """Cases with a result."""
        return sum(self.verdicts.values())

    @property
    def as_expected(self) -> int:
        """Cases that ended as expected."""
        return self.cases - sum(self.unexpected.values())

    def _add(self, result: Result) -> None:
        self.verdicts[result.verdict] += 1
        self.suites.update(filter(None, [result.suite]))
        self.ended.update(filter(None, [result.ended]))
        self.first_host = self.first_host or next((rank.host for rank in result.ranks), "")
        self.lost_rows += result.lost.rows
        if result.limit is not None:
            self.limits[result.limit.status] += 1
            self.max_recv.append(result.limit.max_recv)
            if result.limit.effective is not None:
                self.limit_rows.append(result.limit.effective)
        self.hosts.update(result.hosts)
        self.stand_ins.update(result.stand_ins)
        self.plugins.update(result.plugins)
        self.wall_s.append(result.wall_s)
        if result.suite.startswith(_COMMAND):
            self._hashes.append(result.hash)
        if not result.as_expected:
            self.unexpected[result.verdict] += 1
            if len(self.shown) < _SHOWN:
                self.shown.append(result)
        for time in result.stage_times():
            if time.arm in ARMS and time.stage in STAGES:
                samples = "timed" if time.timed else "checked"
                self.medians_us.setdefault((time.arm, time.stage, samples), array("d")).append(time.median_us)


def quantiles_of(values: array[float]) -> tuple[float, float, float]:
    """The median, the 99th percentile and the maximum."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[(99 * len(ordered) - 1) // 100], ordered[-1]
