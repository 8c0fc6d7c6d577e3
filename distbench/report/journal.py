"""`results.jsonl`: one report a line, on disk before the next case begins. All results are written here."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from pathlib import Path

import msgspec

from distbench.case.entry import Entry
from distbench.case.expectations import is_met
from distbench.case.identity import case_hash
from distbench.errors import OUT_OF_TIME, DistbenchError, InvalidCase, ResultsLost, Verdict
from distbench.report.files import atomic_file, naming, sync_folder, write_report
from distbench.report.findings import FindingReport, codes_behind
from distbench.report.schema import SCHEMA, RateReport, Report, ReportView
from distbench.utils.text import counted, one_line
from distbench.verify.records import Reason

RESULTS = "results.jsonl"
_DAMAGED = "results.damaged.jsonl"
_BLOCK_BYTES = 64 << 10


class _Hash(msgspec.Struct, frozen=True):
    hash: str


class _Wall(msgspec.Struct, frozen=True):
    wall_s: float


class _Injected(msgspec.Struct, frozen=True):
    name: str


class Line(ReportView, frozen=True, kw_only=True):
    """The part of a report that progress and resuming need."""

    case: _Hash
    timing: _Wall
    injected: list[_Injected] = msgspec.field(default_factory=list)
    rate: RateReport | None = None
    reasons: list[Reason] = msgspec.field(default_factory=list)
    findings: list[FindingReport] = msgspec.field(default_factory=list)

    @property
    def exposed(self) -> RateReport | None:
        """Rate of a case without an injected fault that passed or ended unexpectedly; else None."""
        meant = self.injected or (self.as_expected and self.verdict is not Verdict.PASS)
        return None if meant else self.rate

    def ended_as(self, entry: Entry) -> bool:
        """Whether the case ended as `entry`, which is of the same case, expects."""
        safe = self.limit is None or self.limit.safe
        codes = codes_behind(self.verdict, self.findings, self.reasons)
        return is_met(entry.expect, self.verdict, codes, safe=safe, policy=entry.case.policy)


class Journal:
    """Writes reports: rank 0 those of its cases, the supervisor those of cases that lost their ranks.

    Locks the file, so that it waits for a writer left over from another launch.
    """

    def __init__(self, out: Path, report_paths: Sequence[str] = ()) -> None:
        """Open `out`/results.jsonl, created if missing, and cut off an incomplete last line.

        Each report is also written whole to each of `report_paths`.
        """
        self._report_paths = [Path(path) for path in report_paths]
        self._path = out / RESULTS
        self._descriptor = os.open(self._path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
        fcntl.flock(self._descriptor, fcntl.LOCK_EX)
        _cut_torn_line(self._descriptor)
        if not os.fstat(self._descriptor).st_size:
            sync_folder(out)

    def __enter__(self) -> Journal:  # noqa: PYI034 - Self comes with Python 3.11
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def append(self, report: Report) -> None:
        """Write one line and the whole documents, and return when they are on disk."""
        line = memoryview(msgspec.json.encode(report) + b"\n")
        with naming(self._path):
            while line:
                line = line[os.write(self._descriptor, line) :]
            os.fsync(self._descriptor)
        for path in self._report_paths:
            write_report(path, report)

    def close(self) -> None:
        """Close the file."""
        os.close(self._descriptor)


class JournalReader:
    """Reads the lines added since its last call, and keeps none of them."""

    def __init__(self, out: Path) -> None:
        """Start at the beginning of `out`/results.jsonl, which may not exist yet."""
        self._path = out / RESULTS
        self._offset = 0
        self._number = 0

    def new_lines(self) -> Iterator[Line]:
        """Yield complete lines only; one that is being written waits for the next call.

        Raises:
            InvalidCase: the file cannot be read, or a complete line is no report.
            ResultsLost: lines that were read have disappeared.

        """
        try:
            file = self._path.open("rb")
        except OSError as error:
            if not self._offset and isinstance(error, FileNotFoundError):
                return
            raise self._unreadable(error) from error
        with file:
            size = os.fstat(file.fileno()).st_size
            if size < self._offset:
                message = (
                    f"{self._path}: cut to {size} bytes after {counted(self._number, 'result')} had been read from it"
                )
                raise ResultsLost(message)
            file.seek(self._offset)
            for raw in file:
                if not raw.endswith(b"\n"):
                    return
                self._offset += len(raw)
                self._number += 1
                yield _decode(raw, f"{self._path}, line {self._number}")

    def _unreadable(self, error: OSError) -> DistbenchError:
        if self._offset:
            return ResultsLost(
                f"{self._path}: {error.strerror}, after {counted(self._number, 'result')} had been read from it"
            )
        return InvalidCase(f"{self._path}: cannot be read ({error.strerror}); name another folder with --out")


def _decode(raw: bytes, where: str) -> Line:
    try:
        line = msgspec.json.decode(raw, type=Line)
    except (ValueError, RecursionError) as error:
        message = f"{where}: {one_line(error)}; move the file away or use --rerun all"
        raise InvalidCase(message) from error
    if line.schema != SCHEMA:
        message = f"{where}: schema {line.schema!r}, known is {SCHEMA}; use --rerun all"
        raise InvalidCase(message)
    return line


def read_reports(out: Path) -> Iterator[Report]:
    """Yield the whole reports of a journal that no other process writes."""
    decoder = msgspec.json.Decoder(Report)
    with (out / RESULTS).open("rb") as lines:
        yield from map(decoder.decode, lines)


def unfinished(out: Path, entries: Iterable[Entry], keep: Callable[[Line], bool] = lambda _: True) -> list[Entry]:
    """Entries for which the journal holds no result, or none that `keep` accepts.

    Raises:
        InvalidCase: a complete line is no report.

    """
    kept = {line.case.hash for line in JournalReader(out).new_lines() if keep(line)}
    return [entry for entry in entries if case_hash(entry.case) not in kept]


def repair_journal(out: Path) -> None:
    """Cut off an incomplete last line, where there is a journal."""
    if (out / RESULTS).exists():
        Journal(out).close()


def filter_journal(out: Path, keep: Callable[[Line], bool]) -> None:
    """Drop the lines that `keep` rejects, atomically; of two lines for one case the first stays.

    Raises:
        InvalidCase: a complete line is no report.

    """
    seen: set[str] = set()

    def kept(raw: bytes, where: str) -> bytes:
        line = _decode(raw, where)
        if line.case.hash in seen or not keep(line):
            return b""
        seen.add(line.case.hash)
        return raw

    _rewrite(out, kept)


def forget_cases(out: Path, hashes: AbstractSet[str]) -> None:
    """Drop the results of these cases, atomically. A damaged line is moved to results.damaged.jsonl."""
    damaged: list[bytes] = []

    def kept(raw: bytes, where: str) -> bytes:
        try:
            return b"" if _decode(raw, where).case.hash in hashes else raw
        except InvalidCase:
            damaged.append(raw)
            return b""

    _rewrite(out, kept, lambda: _set_aside(out / _DAMAGED, damaged))


def refuse_others(out: Path, suite: str, mine: Callable[[str], bool]) -> None:
    """Refuse to replace the results in `out` where one of them is not of `suite`.

    `mine` decides by name for results written before results named their suite.

    Raises:
        InvalidCase: names a result that would be lost, and the fix.

    """
    fix = "which this would replace; name another folder with --out"
    try:
        others = _strangers(JournalReader(out).new_lines(), suite, mine)
    except InvalidCase as error:
        message = f"folder {out}: holds results that cannot be read, {fix} ({error})"
        raise InvalidCase(message) from error
    _refuse(out, others, fix)


def replace_results(out: Path, suite: str, mine: Callable[[str], bool]) -> None:
    """Remove the results in `out`; refuses as `refuse_others` does."""
    refuse_others(out, suite, mine)
    (out / RESULTS).unlink(missing_ok=True)


def refuse_strangers(out: Path, suite: str, mine: Callable[[str], bool]) -> None:
    """Refuse to add results of `suite` to those of another one in `out`. Damaged lines are ignored.

    `mine` is as in `refuse_others`.

    Raises:
        InvalidCase: names a result of the other one, and the fix.

    """
    _refuse(
        out,
        _strangers(_readable(out), suite, mine),
        "which this would mix with its own; name another folder with --out",
    )


def _strangers(lines: Iterable[Line], suite: str, mine: Callable[[str], bool]) -> list[Line]:
    return [line for line in lines if line.suite != suite and (line.suite or not mine(line.name))]


def _refuse(out: Path, others: Sequence[Line], fix: str) -> None:
    if others:
        whose = f"{others[0].suite}, {others[0].name}" if others[0].suite else others[0].name
        message = f"folder {out}: holds {counted(len(others), 'result')} of something else ({whose:.80}), {fix}"
        raise InvalidCase(message)


def _readable(out: Path) -> Iterator[Line]:
    path = out / RESULTS
    if not path.exists():
        return
    with path.open("rb") as file:
        for raw in file:
            with contextlib.suppress(InvalidCase):
                yield _decode(raw, str(path))


def resume_journal(out: Path, entries: Iterable[Entry]) -> None:
    """Cut off an incomplete last line, and judge the results of `entries` by their current expectations.

    Raises:
        InvalidCase: a complete line is no report.

    """
    repair_journal(out)
    wanted = {case_hash(entry.case): entry for entry in entries}
    lines = ((line, wanted.get(line.case.hash)) for line in JournalReader(out).new_lines())
    if all(entry is None or line.expect == entry.expect for line, entry in lines):
        return

    def held_against(raw: bytes, where: str) -> bytes:
        line = _decode(raw, where)
        entry = wanted.get(line.case.hash)
        if entry is None or line.expect == entry.expect:
            return raw
        document = msgspec.json.decode(raw) | {"expect": entry.expect, "as_expected": line.ended_as(entry)}
        return msgspec.json.encode(document) + b"\n"

    _rewrite(out, held_against)


def _rewrite(out: Path, change: Callable[[bytes, str], bytes], before: Callable[[], None] = lambda: None) -> None:
    """Replace each line by `change(line, its place)`; `before` is called before the file changes."""
    path = out / RESULTS
    if not path.exists():
        return
    repair_journal(out)
    with path.open("rb") as old, atomic_file(path) as new:
        for number, raw in enumerate(old, 1):
            new.write(change(raw, f"{path}, line {number}"))
        before()


def _set_aside(path: Path, damaged: list[bytes]) -> None:
    if damaged:
        with path.open("ab") as file:
            file.writelines(damaged)
            file.flush()
            os.fsync(file.fileno())


def _cut_torn_line(descriptor: int) -> None:
    """Truncate a file after its last line feed; a report never holds one inside."""
    size = end = os.fstat(descriptor).st_size
    while end:
        start = max(end - _BLOCK_BYTES, 0)
        found = os.pread(descriptor, end - start, start).rfind(b"\n") + 1
        end = start + found
        if found:
            break
    if end < size:
        os.ftruncate(descriptor, end)
        os.fsync(descriptor)


class Summary(msgspec.Struct, kw_only=True):
    """`summary.json`: counts by verdict, and the first cases that did not end as expected.

    `events` are ranks lost when no case was in flight; `stopped` is the reason why cases were left out, and
    `left_for_time` the number of those left out for lack of time. `selected` holds the hashes of its cases where
    results.jsonl has other results too, and is empty where it has none. `exit_code` is that of the command, without a
    comparison with a baseline. `limits` counts cases by the status of their limit's proof. `rate` has the wrong tokens
    of all cases together, without those that had injected faults or were expected not to pass.
    """

    suite: str = ""
    cases: int = 0
    finished: int = 0
    as_expected: int = 0
    verdicts: dict[str, int] = {}
    limits: dict[str, int] = {}
    exit_code: int = 0
    stopped: str = ""
    left_for_time: int = 0
    events: list[str] = []
    selected: list[str] = []
    unexpected: list[dict[str, str]] = []
    rate: RateReport | None = None

    @property
    def incomplete_codes(self) -> set[int]:
        """Contribution of cases without a result, and of events, to the exit code."""
        lost = self.cases - self.finished > self.left_for_time or self.events
        codes = {Verdict.RANK_FAULT.exit_code} if lost else set()
        return codes | ({OUT_OF_TIME} if self.left_for_time else set())
