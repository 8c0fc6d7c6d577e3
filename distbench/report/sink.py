"""Output of finished cases, on rank 0."""

from __future__ import annotations

import os
from pathlib import Path

from distbench.case import case_hash
from distbench.errors import Verdict, suite_code
from distbench.expectations import expected_verdict
from distbench.job import Entry, Job
from distbench.report.document import Report, build_report
from distbench.report.environment import capture_environment
from distbench.report.files import write_report
from distbench.report.journal import Journal, JournalReader, expect_anew, repair_journal
from distbench.verify.records import Judgement, Outcome, Reason


class Sink:
    """Turns outcomes into reports: a line of the journal each, and the files that the job names.

    `codes` has the contribution of each case, of this launch or an earlier one, to the exit code. Cases that are
    refused before a rank has seen them have their results from the start.
    """

    def __init__(self, job: Job) -> None:
        """Open the journal in the job's folder, and read which of the job's cases it already holds."""
        self._job = job
        repair_journal(Path(job.out))
        expect_anew(Path(job.out), job.entries)
        wanted = {case_hash(entry.case) for entry in job.entries}
        self.codes = {
            line.case.hash: suite_code(line.exit_code, as_expected=line.as_expected)
            for line in JournalReader(Path(job.out)).new_lines()
            if line.case.hash in wanted
        }
        self._journal = Journal(Path(job.out))
        for entry in job.entries:
            if entry.refused and case_hash(entry.case) not in self.codes:
                self.put(entry, refusal(entry), wall_s=0.0)

    def put(self, entry: Entry, outcome: Outcome, wall_s: float) -> Report:
        """Write the outcome of `entry`, and return the report when it is on disk."""
        records = outcome.gathered.observations if outcome.gathered else []
        environment = capture_environment(os.environ, [one.host for one in records], [one.device for one in records])
        report = build_report(entry, outcome, environment=environment, wall_s=wall_s)
        self._journal.append(report)
        for path in self._job.report_paths:
            write_report(Path(path), report)
        alone = bool(self._job.report_paths)
        code = report.exit_code if alone else suite_code(report.exit_code, as_expected=report.as_expected)
        self.codes[report.case["hash"]] = code
        if not self._job.supervised and not self._job.quiet:
            self._print(report)
        return report

    def close(self) -> None:
        """Close the journal."""
        self._journal.close()

    def _print(self, report: Report) -> None:
        from distbench.report import console  # noqa: PLC0415 - only where something is printed

        if self._job.report_paths:
            console.print_report(report)
        else:
            console.print_line(console.case_line(report))


def refusal(entry: Entry) -> Outcome:
    """Outcome of a case that is refused as it is expected to be."""
    verdict = Verdict(expected_verdict(entry.expect))
    reason = Reason(code=verdict.value.lower(), message=entry.refused)
    return Outcome(entry.case, Judgement(verdict, [reason], None))
