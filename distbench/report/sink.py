"""Results of the cases of a launch, on rank 0."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from distbench.case.entry import Entry
from distbench.case.expectations import expected_verdict
from distbench.case.identity import case_hash
from distbench.errors import Verdict, suite_code
from distbench.report.document import build_report
from distbench.report.environment import capture_environment
from distbench.report.journal import Journal, JournalReader, resume_journal
from distbench.report.schema import Report
from distbench.verify.records import Judgement, Outcome, Reason


class Sink:
    """Turns outcomes into reports: a line each of the journal in `out`, and whole documents at `report_paths`.

    With `prints`, each report is also printed: whole where it has a path of its own, else as one line.
    `codes` has the contribution of each case, of this launch or an earlier one, to the exit code. Cases that are
    refused before a rank has seen them have their results from the start.
    """

    def __init__(
        self, out: Path, entries: Sequence[Entry], report_paths: Sequence[str] = (), *, prints: bool = False
    ) -> None:
        """Open the journal in `out`, and read which of `entries` it already holds."""
        self._alone = bool(report_paths)
        self._prints = prints
        resume_journal(out, entries)
        wanted = {case_hash(entry.case) for entry in entries}
        self.codes = {
            line.case.hash: suite_code(line.exit_code, as_expected=line.as_expected)
            for line in JournalReader(out).new_lines()
            if line.case.hash in wanted
        }
        self._journal = Journal(out, report_paths)
        for entry in entries:
            if entry.refused and case_hash(entry.case) not in self.codes:
                self.put(entry, refusal(entry), wall_s=0.0)

    def put(self, entry: Entry, outcome: Outcome, wall_s: float) -> Report:
        """Write the outcome of `entry`, and return the report when it is on disk."""
        records = outcome.gathered.observations if outcome.gathered else []
        environment = capture_environment(os.environ, [one.host for one in records], [one.device for one in records])
        report = build_report(entry, outcome, environment=environment, wall_s=wall_s)
        self._journal.append(report)
        code = report.exit_code if self._alone else suite_code(report.exit_code, as_expected=report.as_expected)
        self.codes[report.case["hash"]] = code
        if self._prints:
            self._print(report)
        return report

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def _print(self, report: Report) -> None:
        from distbench.report import console, terminal  # noqa: PLC0415 - only where something is printed

        if self._alone:
            console.print_report(report)
        else:
            terminal.print_line(console.case_line(report))


def refusal(entry: Entry) -> Outcome:
    """Outcome of a case that is refused as it is expected to be."""
    verdict = Verdict(expected_verdict(entry.expect))
    reason = Reason(code=verdict.value.lower(), message=entry.refused)
    return Outcome(entry.case, Judgement(verdict, [reason], None))
