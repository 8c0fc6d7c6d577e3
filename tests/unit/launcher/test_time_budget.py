"""A suite with a time budget: durations, estimates, skipped cases, and the exit code of a partial result."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distbench.case.entry import Entry
from distbench.cli.argument_types import duration
from distbench.errors import OutOfTime
from distbench.launcher.campaign import Campaign, Rules
from distbench.launcher.job import Job
from distbench.launcher.postmortem import LaunchFailure
from distbench.launcher.time_budget import SLURM_END, SLURM_RESERVE_S, Deadline, Pace, earliest_deadline
from distbench.report.journal import Journal, Summary
from distbench.report.progress import Progress
from distbench.report.results import Results
from tests.cases import tiny_case
from tests.reports import report_of

CASES = 6
Launch = Callable[[Job], LaunchFailure | None]


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90", 90), ("90s", 90), ("20m", 1200), ("2h", 7200), ("1h30m", 5400), ("1h5s", 3605), (" 5m ", 300)],
)
def test_duration_text_is_parsed_to_seconds(text: str, seconds: float) -> None:
    assert duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "0", "m", "-5m", "20 m", "1.5h", "20min", "1m1h", "999999h", "nan", "５m", "1h30", "５"]
)
def test_malformed_duration_is_refused(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="durations such as 90s, 20m and 1h30m"):
        duration(text)


def test_deadline_is_the_earlier_of_budget_and_slurm_job_end() -> None:
    assert earliest_deadline(None, {}) is None
    assert earliest_deadline(duration("none"), {SLURM_END: str(int(time.time()) + 100)}) is None
    budget = earliest_deadline(60.0, {SLURM_END: str(int(time.time()) + 3600)})
    assert budget is not None
    assert budget.source == "--for 60 s"
    assert 59 < budget.left_s <= 60
    job = earliest_deadline(3600.0, {SLURM_END: str(int(time.time()) + 100)})
    assert job is not None
    assert "the end of the Slurm job (SLURM_JOB_END_TIME; --for none disregards it)" in job.source
    assert 98 - SLURM_RESERVE_S < job.left_s <= 100 - SLURM_RESERVE_S


@pytest.mark.parametrize("text", ["", "0", "unlimited", "4294967294000", "-1", "9" * 5000])
def test_slurm_job_without_a_readable_end_sets_no_deadline(text: str) -> None:
    assert earliest_deadline(None, {SLURM_END: text}) is None


def test_estimate_grows_with_the_work_and_is_at_least_that_of_a_similar_case() -> None:
    pace = Pace()
    small, like, large = (tiny_case(2, tokens=tokens, max_dispatch_tokens_per_rank=4096) for tokens in (8, 8, 4096))
    assert pace.estimate_s(small) == 0.0  # no pace is known: the first case starts
    pace.note(small, 2.0)
    pace.note(like, 1.0)
    assert 2.0 <= pace.estimate_s(like) <= 4.0
    assert pace.estimate_s(large) > pace.estimate_s(small)
    pace.note(large, 3.0)
    assert 3.0 <= pace.estimate_s(large) <= 6.0
    assert Pace(pace.by_class).estimate_s(large) == pace.estimate_s(large)


def test_lost_case_does_not_change_the_pace() -> None:
    pace = Pace()
    pace.note(tiny_case(2), 0.0)
    assert pace.by_class == {}


@pytest.fixture
def entries() -> list[Entry]:
    return [Entry(name=f"case {seed}", case=tiny_case(2, seed=seed), sources={}) for seed in range(CASES)]


def finish(job: Job, count: int, wall_s: float) -> None:
    journal = Journal(Path(job.out))
    for entry in job.entries[:count]:
        report = report_of(entry.case, "", name=entry.name)
        report.timing["wall_s"] = wall_s
        journal.append(report)
    journal.close()


def run(out: Path, entries: list[Entry], launch: Launch, seconds: float | None) -> Summary:
    deadline = None if seconds is None else Deadline(at_s=time.monotonic() + seconds, source=f"--for {seconds:g} s")
    campaign = Campaign(
        entries, out, Rules(deadline=deadline), Progress(CASES, quiet=True), launch=lambda job, *_: launch(job)
    )
    return campaign.run()


def test_case_that_cannot_end_before_the_deadline_is_left_out_and_reported(
    tmp_path: Path, entries: list[Entry]
) -> None:
    launches: list[Job] = []

    def launch(job: Job) -> None:
        launches.append(job)
        finish(job, 4, wall_s=100.0)  # its ranks skip the others

    summary = run(tmp_path, entries, launch, 60.0)
    assert len(launches) == 1
    assert (summary.finished, summary.left_for_time, summary.exit_code) == (4, 2, 75)
    assert summary.stopped.startswith("2 cases left out for time (--for 60 s: ")
    assert "the next case takes about 150.0 s" in summary.stopped
    assert summary.stopped.endswith("the same command resumes with them")
    assert Results(tmp_path).exit_code == 75
    again = run(tmp_path, entries, launch, 60.0)  # by the pace of earlier cases no case starts
    assert (len(launches), again.left_for_time, again.exit_code) == (1, 2, 75)
    whole = run(tmp_path, entries, lambda job: finish(job, CASES, wall_s=1.0), None)
    assert (whole.finished, whole.left_for_time, whole.stopped, whole.exit_code) == (CASES, 0, "", 0)
    assert Results(tmp_path).exit_code == 0


def test_case_in_flight_at_the_deadline_has_no_result(tmp_path: Path, entries: list[Entry]) -> None:
    def launch(job: Job) -> None:
        assert job.deadline is not None
        finish(job, 1, wall_s=0.1)
        time.sleep(max(job.deadline.left_s, 0.0) + 0.1)
        raise OutOfTime(job.deadline.source)

    summary = run(tmp_path, entries, launch, 2.0)
    assert (summary.finished, summary.left_for_time, summary.exit_code) == (1, 5, 75)
    assert "--for 2 s: it is over" in summary.stopped
    assert (tmp_path / "summary.json").exists()


def test_ranks_receive_the_durations_of_earlier_cases(tmp_path: Path, entries: list[Entry]) -> None:
    paces: list[dict[int, float]] = []

    def launch(job: Job) -> None:
        paces.append(dict(job.pace))
        finish(job, 3, wall_s=0.5)

    assert run(tmp_path, entries, launch, 3600.0).finished == CASES
    assert [list(pace.values()) for pace in paces] == [[], [0.5]]


def test_exit_code_of_lost_results_precedes_that_of_the_time_budget(tmp_path: Path, entries: list[Entry]) -> None:
    summary = Summary(cases=CASES, finished=3, left_for_time=2)
    assert summary.incomplete_codes == {3, 75}
    assert Summary(cases=CASES, finished=4, left_for_time=2, events=["rank 1 went"]).incomplete_codes == {3, 75}
    assert Summary(cases=CASES, finished=CASES).incomplete_codes == set()
    del tmp_path, entries
