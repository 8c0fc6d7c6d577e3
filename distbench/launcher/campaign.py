"""Run cases one after another until each has an ending, even if ranks are lost."""

from __future__ import annotations

import contextlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import msgspec

from distbench.case.entry import Entry
from distbench.case.identity import case_hash
from distbench.case.kinds import repeats_of
from distbench.case.spec import Case
from distbench.case.stages import Stage
from distbench.distributed.heartbeat import Position
from distbench.errors import (
    DistbenchError,
    InvalidCase,
    LaunchFailed,
    OutOfTime,
    ResultsLost,
    is_disk_full,
    suite_code,
    worst_exit_code,
)
from distbench.launcher.job import Job
from distbench.launcher.nodes.leader import Leader
from distbench.launcher.postmortem import LaunchFailure, machines, outcome_of
from distbench.launcher.resources import prove_room
from distbench.launcher.supervisor import Tick, supervise
from distbench.launcher.time_budget import Deadline, Pace
from distbench.report.bundle.layout import NOTHING_RECORDED, Recorded, bundle_folder
from distbench.report.bundle.manifest import without_a_bundle, write_manifest
from distbench.report.document import build_report, rate_report
from distbench.report.environment import capture_environment
from distbench.report.files import write_atomically
from distbench.report.journal import (
    RESULTS,
    Journal,
    JournalReader,
    Line,
    Summary,
    filter_journal,
    resume_journal,
)
from distbench.report.progress import Progress
from distbench.report.sink import refusal
from distbench.utils.signals import Interrupted, collect_signals
from distbench.verify.records import Outcome

_WORST_SHOWN = 32

Launch = Callable[[Job, Tick, Sequence[int], Leader | None], LaunchFailure | None]
"""The signature of `supervise`."""


class Rules(msgspec.Struct, frozen=True, kw_only=True):
    """Retries of a case that lost its ranks, and the number of lost cases in a row that stops the campaign.

    No case begins that is not expected to end by the `deadline`; a case under way is ended then.
    """

    retries: int = 0
    max_faults: int = 3
    deadline: Deadline | None = None


class Campaign:
    """Runs entries launch after launch and counts them; results are in the journal."""

    def __init__(  # noqa: PLR0913 - the entries, the folder and the rules
        self,
        entries: Sequence[Entry],
        out: Path,
        rules: Rules,
        progress: Progress,
        bundle: str = "",
        leader: Leader | None = None,
        launch: Launch | None = None,
    ) -> None:
        """Continue the journal of `out`: cases with a result are not run again, but judged by the current expectation.

        `bundle` is as in `Job`. `launch` runs a job to its end; the default is `supervise`.
        """
        resume_journal(out, entries)
        self._entries = entries
        self._out = out
        self._rules = rules
        self._bundle = bundle
        self._leader = leader
        self._launch = launch
        self._progress = progress
        self._reader = JournalReader(out)
        self._wanted = {case_hash(entry.case): entry.case for entry in entries}
        self._pace = Pace()
        self._finished: set[str] = set()
        self._tries: Counter[str] = Counter()
        self._faults_in_row = self._finished_by_then = 0
        self._codes: set[int] = set()
        self._verdicts: Counter[str] = Counter()
        self._limits: Counter[str] = Counter()
        self._exposed: Counter[str] = Counter()
        self._others = False
        self._summary = Summary(suite=entries[0].suite if entries else "", cases=len(entries))

    def run(self, report_paths: tuple[str, ...] = ()) -> Summary:
        """Run the remaining cases and return the summary, which is also written to summary.json.

        Raises:
            Interrupted: by a signal. summary.json is written first, for this and every error below.
            LaunchFailed: no ranks could be started.
            ResultsLost: another process changed the results.
            NodesMissing: not all nodes joined.
            DiskFull: a rank had no room for its results; summary.json is written if there is room for it.

        """
        with collect_signals() as signals, _writable():
            try:
                self._take_new_lines(quiet=True)
                self._record_refusals()
                self._run_launches(report_paths, signals)
            except OutOfTime:
                self._leave_for_time()
            except (Interrupted, DistbenchError) as error:
                self._summary.stopped = str(error)
                self._take_last_lines()
                self._try_to_write_summary(error.exit_code)
                raise
            except BaseException:
                self._try_to_write_summary()
                raise
            self._write_summary()
        return self._summary

    def _try_to_write_summary(self, exit_code: int | None = None) -> None:
        with contextlib.suppress(OSError):  # the folder may be gone; the error that ends the campaign says so
            self._write_summary(exit_code)

    def conclude(self, ending: LaunchFailure | None) -> Summary:
        """Read the journal, record `ending` for the case on which the launch ended, and run nothing.

        A result of that case stays, and `ending` becomes an event of the summary: no supervisor saw the ranks end.
        """
        self._take_new_lines(quiet=True)
        if ending is not None:
            entry = None if ending.case_index is None else self._entries[ending.case_index]
            if entry is None or case_hash(entry.case) in self._finished:
                self._note(ending)
            else:
                self._record(entry, outcome_of(ending, entry), self._job((entry,)), lost=True)
        self._write_summary()
        return self._summary

    def _run_launches(self, report_paths: tuple[str, ...], signals: Sequence[int]) -> None:
        while pending := self._pending():
            if signals:
                raise Interrupted(signals[0])
            if not self._in_time(pending):
                self._leave_for_time()
                return
            job = self._job(pending, report_paths)
            before = len(self._finished)
            ending = (self._launch or supervise)(job, self._tick, signals, self._leader)
            self._take_new_lines()
            if ending is not None:
                self._take_ending(ending, job)
                self._summary.stopped = self._enough(ending) if self._pending() else ""
                if self._summary.stopped:
                    return
            elif len(self._finished) == before and self._in_time(pending):
                raise self._without_a_result()

    def _without_a_result(self) -> DistbenchError:
        """What to say of ranks that ended well and left nothing: their results, if removed, were written to no name."""
        results = self._out / RESULTS
        if not results.exists():
            return ResultsLost(f"{results}: removed while ranks ran")
        return LaunchFailed(f"the ranks ended without a result in {results}")

    def _in_time(self, pending: Sequence[Entry]) -> bool:
        """Whether any of these cases can be expected to end by the deadline."""
        return any(self._pace.fits(entry.case, self._rules.deadline) for entry in pending)

    def _leave_for_time(self) -> None:
        """Record the cases without a result because the time is over, or too short for them."""
        self._take_new_lines()
        pending, deadline = self._pending(), self._rules.deadline
        if not pending or deadline is None:
            return
        self._summary.left_for_time = len(pending)
        needed = self._pace.shortest(entry.case for entry in pending)
        told = f"{deadline.left_s:.1f} s were left, the next case takes about {needed:.1f} s"
        why = f"{deadline.source}: {told if deadline.left_s > 0 else 'it is over'}"
        self._summary.stopped = f"{len(pending)} cases left out for time ({why}); the same command resumes with them"

    def _take_ending(self, ending: LaunchFailure, job: Job) -> None:
        """Record the result of the case on which a launch ended, unless the case is to be retried.

        A result that it already has is revoked: a rank was lost after all, past the last barrier or outside the group.

        Raises:
            DiskFull: no room is left, which may be the only reason why the ranks ended.

        """
        entry = self._entry_of(ending, job)
        if entry is None:
            self._note(ending)
            return
        digest = case_hash(entry.case)
        prove_room(self._out, entry.case)
        if digest in self._finished:
            self._revoke(digest)
        self._tries[digest] += 1
        if self._tries[digest] > self._rules.retries:
            self._faults_in_row = self._faults_in_row + 1 if len(self._finished) == self._finished_by_then else 1
            self._record(entry, outcome_of(ending, entry), job, lost=True)
            self._finished_by_then = len(self._finished)

    def _entry_of(self, ending: LaunchFailure, job: Job) -> Entry | None:
        """The case on which a launch ended. A lost host revokes no result: it had sent its share of that."""
        if ending.case_index is None:
            return None
        entries = job.entries[ending.case_index :]
        if ending.last:
            entries = tuple(entry for entry in entries if case_hash(entry.case) not in self._finished)
        return entries[0] if entries else None

    def _note(self, ending: LaunchFailure) -> None:
        self._summary.events += dict.fromkeys(reason.message for reason in ending.reasons)

    def _enough(self, ending: LaunchFailure) -> str:
        """Reason to make no further launch; empty for none."""
        if ending.last:
            return "; ".join(reason.message for reason in ending.reasons)
        if self._faults_in_row >= self._rules.max_faults:
            return f"{self._faults_in_row} cases in a row lost their ranks"
        return ""

    def _pending(self) -> tuple[Entry, ...]:
        return tuple(entry for entry in self._entries if case_hash(entry.case) not in self._finished)

    def _revoke(self, digest: str) -> None:
        """Delete the result of a case."""
        filter_journal(self._out, lambda line: line.case.hash != digest)
        as_expected = self._summary.as_expected
        self._reader = JournalReader(self._out)
        self._finished.clear()
        self._codes.clear()
        self._verdicts.clear()
        self._limits.clear()
        self._exposed.clear()
        self._summary.as_expected = 0
        self._summary.unexpected.clear()
        for line in self._reader.new_lines():
            if line.case.hash in self._wanted and line.case.hash not in self._finished:
                self._count(line)
        self._progress.give_back(as_expected=self._summary.as_expected < as_expected)

    def _job(self, entries: tuple[Entry, ...], report_paths: tuple[str, ...] = ()) -> Job:
        return Job(
            entries=entries,
            out=str(self._out),
            report_paths=report_paths,
            bundle=self._bundle,
            supervised=True,
            deadline=self._rules.deadline,
            pace=self._pace.by_class,
        )

    def _record_refusals(self) -> None:
        for entry in self._pending():
            if entry.refused:
                self._record(entry, refusal(entry), self._job((entry,)))

    def _record(self, entry: Entry, outcome: Outcome, job: Job, *, lost: bool = False) -> None:
        """Write the result of a case whose ranks did not: they are `lost`, or never saw it."""
        where = machines(self._out, entry.case.ep_size) if lost else {}
        hosts = {rank: machine.host for rank, machine in where.items()}
        devices = ["cpu" if entry.case.device == "cpu" else machine.device for machine in where.values()]
        environment = capture_environment(os.environ, list(hosts.values()), devices)
        report = build_report(entry, outcome, environment=environment, wall_s=0.0)
        with Journal(self._out, job.report_paths) as journal:
            journal.append(report)
        if job.bundle and job.failed(report.exit_code, as_expected=report.as_expected):
            folder = bundle_folder(job.bundle, entry.case)
            with without_a_bundle(entry.name):
                recorded = _routing(folder, entry.case, hosts) if lost else NOTHING_RECORDED
                write_manifest(folder, report, outcome, recorded)
        self._take_new_lines()

    def _tick(self, current: Entry | None, slowest: Position | None) -> None:
        try:
            self._take_new_lines()
        except InvalidCase as error:  # the ranks write no line like this
            raise ResultsLost(str(error)) from error
        if current is None or slowest is None:
            ended = slowest is not None and slowest.stage_name == Stage.DONE
            self._progress.refresh("", "ranks end" if ended else "ranks start")
            return
        self._progress.refresh(current.name, slowest.place, slowest.repeat, repeats_of(current.case))

    def _take_new_lines(self, *, quiet: bool = False) -> None:
        for line in self._reader.new_lines():
            self._others |= line.case.hash not in self._wanted
            if line.case.hash in self._wanted and line.case.hash not in self._finished:
                self._count(line)
                self._progress.take(line, quiet=quiet)

    def _take_last_lines(self) -> None:
        """Count what the ranks finished before they were ended; what cannot be read is the error's to say."""
        with contextlib.suppress(DistbenchError, OSError):
            self._take_new_lines(quiet=True)

    def _count(self, line: Line) -> None:
        self._finished.add(line.case.hash)
        self._pace.note(self._wanted[line.case.hash], line.timing.wall_s)
        self._verdicts[line.verdict.value] += 1
        if line.limit is not None:
            self._limits[line.limit.status] += 1
        self._summary.as_expected += line.as_expected
        self._codes.add(suite_code(line.exit_code, as_expected=line.as_expected))
        if line.exposed is not None:
            self._exposed.update(
                tokens=line.exposed.tokens, wrong=line.exposed.wrong_tokens, repeats=line.exposed.repeats
            )
        if not line.as_expected and len(self._summary.unexpected) < _WORST_SHOWN:
            self._summary.unexpected.append({"name": line.name, "verdict": line.verdict.value, "hash": line.case.hash})

    def _write_summary(self, exit_code: int | None = None) -> None:
        """Write summary.json; `exit_code` is that of an error that ends the command, and takes precedence."""
        self._summary.finished = len(self._finished)
        self._summary.verdicts = dict(self._verdicts)
        self._summary.limits = dict(self._limits)
        self._summary.rate = rate_report(*(self._exposed[name] for name in ("wrong", "tokens", "repeats")))
        self._summary.exit_code = worst_exit_code(self._codes)
        self._summary.exit_code = worst_exit_code({self._summary.exit_code, *self._summary.incomplete_codes})
        if exit_code is not None:
            self._summary.exit_code = exit_code
        self._summary.selected = sorted(self._wanted) if self._others else []
        content = msgspec.json.format(msgspec.json.encode(self._summary), indent=2) + b"\n"
        write_atomically(self._out / "summary.json", content)


@contextlib.contextmanager
def _writable() -> Iterator[None]:
    """Report a file that cannot be written, unless the disk is full, as a folder changed by another process."""
    try:
        yield
    except OSError as error:
        if is_disk_full(error) or error.filename is None:
            raise
        message = f"{error.filename}: {error.strerror}"
        raise ResultsLost(message) from error


def _routing(folder: Path, case: Case, hosts: dict[int, str]) -> Recorded:
    from distbench.report.bundle.write import write_routing  # noqa: PLC0415 - loads torch, for lost ranks with a bundle only

    return write_routing(folder, case, hosts)
