"""Sequence of launches, with fake launches: recorded, retried and withdrawn results, and the end of a suite."""

from __future__ import annotations

import errno
import json
import signal
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distbench.case.entry import Entry
from distbench.case.identity import case_hash
from distbench.cli import launching
from distbench.cli.main import main
from distbench.distributed.heartbeat import Position
from distbench.errors import DiskFull, LaunchFailed, ResultsLost, Verdict
from distbench.launcher import campaign
from distbench.launcher.campaign import Campaign, Rules
from distbench.launcher.job import Job
from distbench.launcher.postmortem import LaunchFailure
from distbench.launcher.supervisor import Tick
from distbench.report.journal import RESULTS, Journal, JournalReader, Summary
from distbench.report.progress import Progress
from distbench.report.results import Results
from distbench.utils.signals import Interrupted
from distbench.verify.records import Reason
from tests.cases import tiny_case
from tests.reports import report_of

CASES = 6
Launch = Callable[[Job], LaunchFailure | None]


@pytest.fixture
def entries() -> list[Entry]:
    return [Entry(name=f"case {seed}", case=tiny_case(2, seed=seed), sources={}) for seed in range(CASES)]


def finish(job: Job, count: int) -> None:
    """Write results of the job's first cases, as its ranks would."""
    journal = Journal(Path(job.out))
    for entry in job.entries[:count]:
        journal.append(report_of(entry.case, "", name=entry.name))
    journal.close()


def seed_of(entry: Entry) -> int:
    return entry.case.seed


def lost(case_index: int | None, verdict: Verdict = Verdict.RANK_FAULT) -> LaunchFailure:
    return LaunchFailure(
        verdict=verdict, case_index=case_index, reasons=[Reason(code="why", rank=1, message="rank 1 went")]
    )


def killers(*seeds: int) -> Launch:
    """Fake launches in which these cases always kill a rank."""

    def launch(job: Job) -> LaunchFailure | None:
        count = next((index for index, entry in enumerate(job.entries) if seed_of(entry) in seeds), None)
        finish(job, len(job.entries) if count is None else count)
        return None if count is None else lost(count)

    return launch


def run(
    monkeypatch: pytest.MonkeyPatch, out: Path, entries: Sequence[Entry], launch: Launch, **rules: Any
) -> tuple[Summary, dict[str, str]]:
    """Run a campaign over fake launches; return its summary and the verdicts by name."""

    def supervise(job: Job, *_: Any) -> LaunchFailure | None:
        return launch(job)

    monkeypatch.setattr(campaign, "supervise", supervise)
    summary = Campaign(entries, out, Rules(**rules), Progress(len(entries), quiet=True)).run()
    return summary, verdicts(out)


def verdicts(out: Path) -> dict[str, str]:
    lines = list(JournalReader(out).new_lines())
    assert len({line.name for line in lines}) == len(lines)
    return {line.name: line.verdict.value for line in lines}


def passed(*but: int) -> dict[str, str]:
    return {f"case {seed}": "RANK_FAULT" if seed in but else "PASS" for seed in range(CASES)}


@pytest.mark.parametrize(("retries", "max_faults"), [(0, 2), (1, 2), (5, 3), (5, 2)])
def test_case_that_always_kills_its_ranks_is_recorded_and_the_others_run(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[Entry], retries: int, max_faults: int
) -> None:
    launches: list[int] = []

    def launch(job: Job) -> LaunchFailure | None:
        launches.append(len(job.entries))
        return killers(2)(job)

    summary, found = run(monkeypatch, tmp_path, entries, launch, retries=retries, max_faults=max_faults)
    assert found == passed(2)
    assert (summary.finished, summary.stopped, summary.exit_code) == (CASES, "", 3)
    assert launches == [CASES] + [CASES - 2] * retries + [CASES - 3]


def test_result_that_arrives_while_a_signal_ends_the_ranks_is_counted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[Entry]
) -> None:
    def launch(job: Job) -> LaunchFailure | None:
        finish(job, 3)
        raise Interrupted(signal.SIGTERM)

    with pytest.raises(Interrupted):
        run(monkeypatch, tmp_path, entries, launch)
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["finished"], summary["verdicts"], len(verdicts(tmp_path))) == (3, {"PASS": 3}, 3)


@pytest.mark.parametrize(("finished", "seen_in"), [(3, 1), (3, 3), (CASES, CASES - 1)])
def test_finished_results_stay_if_a_host_is_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[Entry], finished: int, seen_in: int
) -> None:
    def launch(job: Job) -> LaunchFailure | None:
        finish(job, finished)
        return msgspec.structs.replace(lost(seen_in), last=True)

    summary, found = run(monkeypatch, tmp_path, entries, launch)
    assert found == {name: verdict for name, verdict in passed(3).items() if name <= f"case {finished}"} | {
        f"case {seed}": "PASS" for seed in range(finished)
    }
    assert summary.exit_code == 3
    assert "rank 1 went" in [summary.stopped, *summary.events]


@pytest.mark.parametrize("retries", [0, 4])
def test_suite_stops_after_max_faults_consecutive_rank_faults(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[Entry], retries: int
) -> None:
    summary, found = run(monkeypatch, tmp_path, entries, killers(1, 2, 3, 4), retries=retries, max_faults=3)
    assert found == {name: verdict for name, verdict in passed(1, 2, 3).items() if name < "case 4"}
    assert summary.stopped == "3 cases in a row lost their ranks"
    assert (summary.finished, summary.exit_code) == (4, 3)


def test_rank_faults_with_a_finished_case_between_them_are_not_consecutive(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[Entry]
) -> None:
    summary, found = run(monkeypatch, tmp_path, entries, killers(0, 1, 3, 4), max_faults=3)
    assert found == passed(0, 1, 3, 4)
    assert summary.stopped == ""


@pytest.mark.parametrize("verdict", [Verdict.HANG, Verdict.RANK_FAULT])
def test_result_is_withdrawn_if_the_ranks_of_its_case_are_lost_afterwards(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[Entry], verdict: Verdict
) -> None:
    endings = iter([lost(1, verdict), None])

    def launch(job: Job) -> LaunchFailure | None:
        ending = next(endings)
        finish(job, 2 if ending else len(job.entries))
        return ending

    summary, found = run(monkeypatch, tmp_path, entries, launch)
    assert found == passed() | {"case 1": verdict.value}
    assert (summary.finished, summary.exit_code, summary.as_expected) == (CASES, 3, CASES - 1)


def test_ranks_lost_after_the_last_case_are_recorded_as_an_event(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[Entry]
) -> None:
    def launch(job: Job) -> LaunchFailure:
        finish(job, len(job.entries))
        return lost(None)

    summary, found = run(monkeypatch, tmp_path, entries, launch)
    assert found == passed()
    assert (summary.events, summary.exit_code, Results(tmp_path).exit_code) == (["rank 1 went"], 3, 3)


@pytest.mark.parametrize("error", [LaunchFailed("no files"), DiskFull("no room")])
def test_failed_launch_gives_exit_code_3_and_no_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[Entry], error: LaunchFailed | DiskFull
) -> None:
    def launch(job: Job) -> LaunchFailure:
        finish(job, 1)
        raise error

    with pytest.raises(type(error)) as caught:
        run(monkeypatch, tmp_path, entries, launch)
    assert caught.value.exit_code == 3
    assert verdicts(tmp_path) == {"case 0": "PASS"}
    summary = Results(tmp_path).summary
    assert summary is not None
    assert (summary.stopped, summary.exit_code) == (str(error), 3)


def test_ranks_that_died_on_a_full_disk_give_no_verdict(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[Entry]
) -> None:
    def full(**_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(tempfile, "TemporaryFile", full)
    with pytest.raises(DiskFull, match=rf"^{tmp_path}: No space left on device; free some space"):
        run(monkeypatch, tmp_path, entries, killers(1))
    assert verdicts(tmp_path) == {"case 0": "PASS"}


def test_ranks_that_end_without_a_result_fail_the_launch_and_are_not_restarted(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[Entry]
) -> None:
    (tmp_path / RESULTS).touch()
    with pytest.raises(LaunchFailed, match="ended without a result"):
        run(monkeypatch, tmp_path, entries, lambda _: None)


def test_results_removed_between_two_looks_at_them_are_lost(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[Entry]
) -> None:
    with pytest.raises(ResultsLost, match=f"^{tmp_path / RESULTS}: removed while ranks ran; "):
        run(monkeypatch, tmp_path, entries, lambda _: None)


def test_progress_shows_the_case_in_flight(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[Entry]
) -> None:
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(Progress, "refresh", lambda _, *state: told.append(state))

    def supervise(job: Job, tick: Tick, *_: Any) -> None:
        tick(None, None)
        tick(job.entries[1], Position(1, 1, 4, 0, 1, 9, repeat=3))
        finish(job, len(job.entries))

    monkeypatch.setattr(campaign, "supervise", supervise)
    Campaign(entries, tmp_path, Rules(), Progress(CASES, quiet=True)).run()
    assert told == [("", "ranks start"), ("case 1", "padded/dispatch", 3, 1)]


def test_full_disk_while_writing_the_summary_ends_the_command_in_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, _: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(campaign, "write_atomically", full)
    monkeypatch.setattr(campaign, "supervise", lambda job, *_: finish(job, len(job.entries)))
    monkeypatch.setattr(launching, "preload_ranks", lambda: None)
    assert main(["suite", "smoke", "--nproc=2", "--quiet", f"--out={tmp_path}"]) == 3
    told = f"distbench: DISK_FULL: {tmp_path}/summary.json: No space left on device; free some space or name another"
    assert capsys.readouterr().err.startswith(told)
    assert len(verdicts(tmp_path)) > 5


def test_hang_reported_after_a_case_has_finished_keeps_its_result(tmp_path: Path, entries: list[Entry]) -> None:
    finish(Job(entries=tuple(entries), out=str(tmp_path), supervised=False), CASES)
    kept = Campaign(entries, tmp_path, Rules(), Progress(CASES, quiet=True)).conclude(lost(CASES - 1, Verdict.HANG))
    assert verdicts(tmp_path) == passed()
    assert (kept.events, kept.exit_code) == (["rank 1 went"], 3)
    assert {line.case.hash for line in JournalReader(tmp_path).new_lines()} == {case_hash(one.case) for one in entries}


def test_verdict_stays_if_its_bundle_cannot_be_written(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, entries: list[Entry], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(campaign, "supervise", lambda job, *_: killers(1)(job))
    progress = Progress(CASES, quiet=True)
    summary = Campaign(entries, tmp_path, Rules(), progress, bundle=str(tmp_path / "file" / "bundles")).run()
    assert verdicts(tmp_path) == passed(1)
    assert (summary.exit_code, summary.stopped, summary.events) == (3, "", [])
    (told,) = capsys.readouterr().err.splitlines()
    assert told.startswith(f"distbench: no bundle of case case 1: {tmp_path}/file/bundles/")
    assert told.endswith(": Not a directory; its verdict stands")
