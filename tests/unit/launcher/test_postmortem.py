"""Attribution of a rank fault from the files of dead ranks."""

from __future__ import annotations

import os
import time
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbench.case.entry import Entry
from distbench.case.stages import Stage
from distbench.distributed.heartbeat import Heartbeat, Position, read_position
from distbench.errors import DiskFull, LaunchFailed, ResultsLost, Verdict
from distbench.launcher.job import Job, RankFailure, failure_path, heartbeat_path, ranks_folder
from distbench.launcher.postmortem import Exit, LaunchFailure, explain_fault, outcome_of, positions
from tests.cases import tiny_case

KILLED = Exit(2, "SIGKILL")


@pytest.fixture
def job(tmp_path: Path) -> Job:
    """Job of two cases on four ranks, without any file yet."""
    ranks_folder(tmp_path).mkdir()
    entries = tuple(Entry(name=f"case {seed}", case=tiny_case(seed=seed), sources={}) for seed in range(2))
    return Job(entries=entries, out=str(tmp_path), supervised=True)


def leave(job: Job, rank: int, *stages: str, arm: str = "", case_index: int = 1) -> Position:
    """Record that a rank went through `stages` and ended in the last."""
    heartbeat = Heartbeat(heartbeat_path(Path(job.out), rank))
    heartbeat.case_index, heartbeat.arm = case_index, arm
    for stage in ("start", *stages):
        heartbeat.mark(Stage(stage))
    heartbeat.close()
    position = read_position(heartbeat_path(Path(job.out), rank))
    assert position is not None
    return position


def speak(job: Job, rank: int, position: Position, **why: bool) -> None:
    """Write the failure of a rank; `why` has flags of RankFailure."""
    known: dict[str, bool] = {"echo": False, "timeout": False} | why
    failure = RankFailure(
        rank=rank, exception="ValueError", message="broken", position=position, traceback="Traceback", **known
    )
    failure_path(Path(job.out), rank).write_bytes(msgspec.json.encode(failure))


def leave_all(job: Job, *stages: str, arm: str = "") -> None:
    for rank in range(job.num_ranks):
        leave(job, rank, *stages, arm=arm)


def blamed(ending: LaunchFailure) -> list[tuple[str, int | None]]:
    return [(reason.code, reason.rank) for reason in ending.reasons]


@pytest.mark.parametrize(
    ("arm", "code"), [("padded", "baseline-fault"), ("truncated", "rank-fault"), ("", "rank-fault")]
)
def test_process_that_died_first_is_blamed_with_its_stage(job: Job, arm: str, code: str) -> None:
    leave_all(job, "dispatch", arm=arm)
    ending = explain_fault(job, KILLED)
    place = f"{arm}/dispatch" if arm else "dispatch"
    whose = " (the baseline's own arm)" if arm == "padded" else ""
    assert (ending.verdict, ending.case_index, blamed(ending)) == (Verdict.RANK_FAULT, 1, [(code, 2)])
    assert ending.reasons[0].message == f"rank 2 ended by SIGKILL in {place}{whose}"


def test_earliest_exception_is_blamed_before_any_death(job: Job) -> None:
    leave_all(job, "dispatch", arm="control")
    first = leave(job, 3, "experts", arm="control")
    time.sleep(0.001)
    speak(job, 1, leave(job, 1, "experts", arm="control"))
    speak(job, 3, first)
    ending = explain_fault(job, KILLED)
    assert blamed(ending) == [("rank-fault", 3)]
    assert ending.reasons[0].message == "rank 3 raised ValueError in control/experts: broken"
    assert ending.stacks == {"3": "Traceback"}


def test_ranks_that_lost_their_peer_are_not_blamed(job: Job) -> None:
    leave_all(job, "combine", arm="truncated")
    for rank in (0, 1, 3):
        speak(job, rank, leave(job, rank, "combine", arm="truncated"), echo=True)
    assert blamed(explain_fault(job, Exit(0, "exit code 3"))) == [("rank-fault", 2)]
    assert blamed(explain_fault(job, None)) == [("rank-fault", 2)]
    assert explain_fault(job, None).reasons[0].message == "rank 2 ended without an error message in truncated/combine"


def test_ranks_furthest_behind_are_blamed_if_no_rank_left_an_error(job: Job) -> None:
    for rank in (1, 3, 0):
        leave(job, rank, "experts", "combine", arm="control")
    leave(job, 2, "experts", arm="control")
    ending = explain_fault(job, None)
    assert (ending.verdict, ending.case_index, blamed(ending)) == (Verdict.HANG, 1, [("hang", 2)])
    assert ending.reasons[0].message == (
        "rank 2 was behind in control/experts, rank 0, 1, 3 waited; all ended without an error message"
    )


def test_rank_that_never_started_is_blamed_if_no_rank_left_an_error(job: Job) -> None:
    for rank in (0, 1, 3):
        leave(job, rank, case_index=0)
    ending = explain_fault(job, None)
    assert (ending.verdict, ending.case_index, blamed(ending)) == (Verdict.HANG, 0, [("hang", 2)])
    assert ending.reasons[0].message.startswith("rank 2 was behind before its first stage, rank 0, 1, 3 waited")


def test_no_rank_is_blamed_if_none_left_an_error_and_none_is_behind(job: Job) -> None:
    leave_all(job, "experts", arm="control")
    ending = explain_fault(job, None)
    assert (ending.verdict, blamed(ending)) == (Verdict.RANK_FAULT, [("rank-fault", None)])
    assert ending.reasons[0].message == (
        "rank 0, 1, 2, 3 ended without an error message in control/experts, none behind another"
    )


def test_earliest_error_is_blamed_if_all_ranks_only_lost_a_peer(job: Job) -> None:
    for rank in range(job.num_ranks):
        speak(job, rank, leave(job, rank, "agree"), echo=True)
    assert blamed(explain_fault(job, None)) == [("rank-fault", 0)]


def test_finished_ranks_are_not_blamed(job: Job) -> None:
    for rank in range(3):
        leave(job, rank, "gather", "done")
    leave(job, 3, "gather")
    assert blamed(explain_fault(job, KILLED)) == [("rank-fault", 3)]


def test_timeout_is_blamed_on_the_ranks_that_are_behind(job: Job) -> None:
    leave(job, 0, "dispatch", "combine", arm="control")
    leave(job, 1, "dispatch", arm="control")
    for rank in (2, 3):
        speak(job, rank, leave(job, rank, "dispatch", "combine", arm="control"), timeout=True)
    ending = explain_fault(job, None)
    assert (ending.verdict, blamed(ending)) == (Verdict.HANG, [("hang", 1)])
    assert ending.reasons[0].message == (
        "rank 1 stood in control/dispatch; rank 2, 3 waited until the collective timed out"
    )
    assert ending.stacks.keys() == {"2", "3"}


def test_timeout_is_blamed_on_the_rank_that_never_started(job: Job) -> None:
    for rank in (0, 1, 3):
        speak(job, rank, leave(job, rank, case_index=0), timeout=True)
    ending = explain_fault(job, None)
    assert blamed(ending) == [("hang", 2)]
    assert ending.reasons[0].message.startswith("rank 2 never began; rank 0, 1, 3 waited")


def test_launch_without_any_position_is_a_failed_launch(job: Job) -> None:
    assert positions(job) == {}
    with pytest.raises(
        LaunchFailed, match=r"had begun; rank 2 ended by SIGKILL; anything it printed is on standard error"
    ):
        explain_fault(job, KILLED)
    unknown = (
        r"had begun; none of 4 left a heartbeat or an exception in .*, and their exit codes are unknown; .* is on "
    )
    with pytest.raises(LaunchFailed, match=f"{unknown}standard error of its node, a kill in the kernel's log"):
        explain_fault(job, None)
    with pytest.raises(LaunchFailed, match=f"{unknown}the output of the launcher"):  # `distbench collect`, afterwards
        explain_fault(msgspec.structs.replace(job, supervised=False), None)


@pytest.mark.parametrize("size", [0, 40])
def test_cut_heartbeats_are_lost_results_whatever_signal_ended_the_rank(job: Job, size: int) -> None:
    leave_all(job, "dispatch")
    for rank in range(job.num_ranks):
        os.truncate(heartbeat_path(Path(job.out), rank), size)
    with pytest.raises(
        ResultsLost, match=r"rank-00000.heartbeat: the heartbeat was cut while its rank ran; let nothing else write"
    ):
        explain_fault(job, Exit(1, "SIGBUS"))


def test_rank_that_died_before_its_first_stage_is_blamed(job: Job) -> None:
    for rank in (0, 1, 3):
        leave(job, rank, case_index=0)
    ending = explain_fault(job, KILLED)
    assert (ending.case_index, blamed(ending)) == (0, [("rank-fault", 2)])
    assert ending.reasons[0].message == "rank 2 ended by SIGKILL before its first stage"


def test_death_after_all_ranks_are_done_is_blamed_without_a_case(job: Job) -> None:
    leave_all(job, "done")
    ending = explain_fault(job, KILLED)
    assert (ending.case_index, blamed(ending)) == (None, [("rank-fault", 2)])
    assert ending.reasons[0].message == "rank 2 ended by SIGKILL after all cases had been done"


def test_full_disk_is_reported_and_no_rank_is_blamed(job: Job) -> None:
    leave_all(job, "report")
    speak(job, 0, leave(job, 0, "report"), disk_full=True)
    with pytest.raises(DiskFull, match=r"rank 0 raised ValueError in report: broken; free some space or name another"):
        explain_fault(job, Exit(0, "exit code 3"))


def test_position_past_the_last_case_counts_as_the_last_case(job: Job) -> None:
    for rank in range(job.num_ranks):
        leave(job, rank, case_index=7)
    assert explain_fault(job, KILLED).case_index == 1


def test_outcome_of_lost_ranks_holds_case_reasons_and_positions(job: Job) -> None:
    leave_all(job, "agree")
    ending = explain_fault(job, KILLED)
    outcome = outcome_of(ending, job.entries[1])
    assert outcome.case == job.entries[1].case
    assert (outcome.judgement.verdict, outcome.judgement.reasons) == (ending.verdict, ending.reasons)
    assert outcome.gathered is None


@settings(deadline=None)
@given(content=st.binary(max_size=60), words=st.binary(max_size=60))
def test_damaged_position_files_blame_no_wrong_rank(
    tmp_path_factory: pytest.TempPathFactory, content: bytes, words: bytes
) -> None:
    out = tmp_path_factory.mktemp("job")
    job = Job(entries=(Entry(name="", case=tiny_case(2), sources={}),), out=str(out), supervised=True)
    ranks_folder(out).mkdir()
    heartbeat_path(out, 0).write_bytes(content)
    failure_path(out, 0).write_bytes(words)
    leave(job, 1, "done", case_index=0)
    assert blamed(explain_fault(job, None)) == [("rank-fault", 0)]


def test_progress_of_a_rank_increases_although_stages_repeat(job: Job) -> None:
    """Repeats and the second check of an arm return to earlier stages."""
    before = leave(job, 0, "experts", "check", "combine", arm="truncated")
    after = leave(job, 0, "experts", "check", "combine", "check", arm="truncated")
    again = leave(job, 0, "experts", "check", "combine", "check", "dispatch", arm="truncated")
    following = leave(job, 0, case_index=2)
    assert before.progress < after.progress < again.progress < following.progress


@pytest.mark.parametrize("why", [{"echo": True}, {"timeout": True}])
def test_rank_outside_the_group_of_a_case_is_not_blamed(job: Job, why: dict[str, bool]) -> None:
    for outside in (2, 3):
        leave(job, outside, case_index=1)
    leave(job, 1, "dispatch", case_index=0)
    speak(job, 0, leave(job, 0, "dispatch", "experts", case_index=0), **why)
    assert {reason.rank for reason in explain_fault(job, None).reasons} == {1}


def test_no_rank_outside_the_group_is_blamed_if_all_of_the_group_waited(job: Job) -> None:
    for outside in (2, 3):
        leave(job, outside, case_index=1)
    for inside in (0, 1):
        speak(job, inside, leave(job, inside, "dispatch", case_index=0), timeout=True)
    assert {reason.rank for reason in explain_fault(job, None).reasons} == {0, 1}
