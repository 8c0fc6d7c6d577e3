"""Cases one after another until each has an ending, whatever becomes of the ranks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import msgspec

from distbench.bundle.layout import NOTHING_RECORDED, bundle_folder
from distbench.bundle.manifest import write_manifest
from distbench.case import case_hash
from distbench.errors import Verdict, suite_code, worst_exit_code
from distbench.job import Entry, Job
from distbench.nodes.hub import Hub
from distbench.postmortem import Ending, outcome_of
from distbench.progress import Progress
from distbench.report.document import build_report
from distbench.report.environment import capture_environment
from distbench.report.files import write_atomically, write_report
from distbench.report.journal import Journal, JournalReader, Line, filter_journal, repair_journal
from distbench.report.summary import Summary
from distbench.supervisor import Interrupted, collect_signals, supervise

_WORST_SHOWN = 32


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """How often a case that lost its ranks is tried again, and after how many such cases in a row to stop."""

    retries: int = 0
    max_faults: int = 3


class Campaign:
    """Runs entries launch after launch, keeping count; results are in the journal."""

    def __init__(  # noqa: PLR0913 - what, where to, and how
        self,
        entries: Sequence[Entry],
        out: Path,
        rules: Rules,
        progress: Progress,
        bundle: str = "",
        hub: Hub | None = None,
    ) -> None:
        """Take up the journal of `out`: cases that it holds are not run again. `bundle` is as in `Job`."""
        repair_journal(out)
        self._entries = entries
        self._out = out
        self._rules = rules
        self._bundle = bundle
        self._hub = hub
        self._progress = progress
        self._reader = JournalReader(out)
        self._wanted = {case_hash(entry.case) for entry in entries}
        self._finished: set[str] = set()
        self._codes: set[int] = set()
        self._verdicts: Counter[str] = Counter()
        self._summary = Summary(cases=len(entries))

    def run(self, report_paths: tuple[str, ...] = ()) -> Summary:
        """Run what is left and return the summary, which is also written to summary.json.

        Raises:
            Interrupted: by a signal, after summary.json was written.

        """
        with collect_signals() as signals:
            try:
                self._take_new_lines(quiet=True)
                self._run_launches(report_paths, signals)
            except Interrupted as error:
                self._summary.stopped = str(error)
                raise
            finally:
                self._write_summary()
        return self._summary

    def conclude(self, ending: Ending | None) -> Summary:
        """Take the journal as it is, record `ending` for the case on which the launch ended, and run nothing."""
        self._take_new_lines(quiet=True)
        if ending is not None and case_hash(self._entries[ending.case_index].case) not in self._finished:
            entry = self._entries[ending.case_index]
            self._record(entry, ending, Job(entries=(entry,), out=str(self._out), bundle=self._bundle, supervised=True))
        self._write_summary()
        return self._summary

    def _run_launches(self, report_paths: tuple[str, ...], signals: Sequence[int]) -> None:
        tries: Counter[str] = Counter()
        faults = 0
        while pending := self._pending():
            if signals:
                raise Interrupted(signals[0])
            job = Job(
                entries=pending, out=str(self._out), report_paths=report_paths, bundle=self._bundle, supervised=True
            )
            before = len(self._finished)
            ending = supervise(job, self._tick, signals, self._hub)
            self._take_new_lines()
            if ending is None:
                if len(self._finished) == before:
                    message = "the ranks came to their end and left no result; is the disk full?"
                    raise RuntimeError(message)
                continue
            faults = faults + 1 if len(self._finished) == before else 1
            entry = pending[ending.case_index]
            digest = case_hash(entry.case)
            tries[digest] += 1
            if digest in self._finished and ending.verdict is Verdict.RANK_FAULT:
                self._revoke(digest)
            if digest not in self._finished and tries[digest] > self._rules.retries:
                self._record(entry, ending, job)
            if ending.last and self._pending():
                self._summary.stopped = "; ".join(reason.message for reason in ending.reasons)
                return
            if faults >= self._rules.max_faults and self._pending():
                self._summary.stopped = f"{faults} cases in a row lost their ranks"
                return

    def _pending(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self._entries if case_hash(entry.case) not in self._finished)

    def _revoke(self, digest: str) -> None:
        """Take back what was written of a case of which a rank died after all, behind the last barrier."""
        filter_journal(self._out, lambda line: line.case.hash != digest)
        self._reader = JournalReader(self._out)
        self._finished.clear()
        self._codes.clear()
        self._verdicts.clear()
        self._summary.as_expected = 0
        self._summary.unexpected.clear()
        for line in self._reader.new_lines():
            if line.case.hash in self._wanted and line.case.hash not in self._finished:
                self._count(line)
        self._progress.give_back()

    def _record(self, entry: Entry, ending: Ending, job: Job) -> None:
        outcome = outcome_of(ending, entry)
        report = build_report(entry, outcome, environment=capture_environment(os.environ, [], []), wall_s=0.0)
        journal = Journal(self._out)
        journal.append(report)
        journal.close()
        for path in job.report_paths:
            write_report(Path(path), report)
        if job.bundle and job.failed(report.exit_code, as_expected=report.as_expected):
            write_manifest(bundle_folder(job.bundle, entry.case), report, outcome, NOTHING_RECORDED)
        self._take_new_lines()

    def _tick(self) -> None:
        self._take_new_lines()
        self._progress.refresh()

    def _take_new_lines(self, *, quiet: bool = False) -> None:
        for line in self._reader.new_lines():
            if line.case.hash in self._wanted and line.case.hash not in self._finished:
                self._count(line)
                self._progress.take(line, quiet=quiet)

    def _count(self, line: Line) -> None:
        self._finished.add(line.case.hash)
        self._verdicts[line.verdict.value] += 1
        self._summary.as_expected += line.as_expected
        self._codes.add(suite_code(line.exit_code, as_expected=line.as_expected))
        if not line.as_expected and len(self._summary.unexpected) < _WORST_SHOWN:
            self._summary.unexpected.append({"name": line.name, "verdict": line.verdict.value, "hash": line.case.hash})

    def _write_summary(self) -> None:
        self._summary.finished = len(self._finished)
        self._summary.verdicts = dict(self._verdicts)
        self._summary.exit_code = worst_exit_code(self._codes)
        if self._summary.finished < self._summary.cases:
            self._summary.exit_code = worst_exit_code({self._summary.exit_code, Verdict.RANK_FAULT.exit_code})
        content = msgspec.json.format(msgspec.json.encode(self._summary), indent=2) + b"\n"
        write_atomically(self._out / "summary.json", content)
