"""Attribution of hangs to the rank that the others wait for: from positions and stacks, and before any heartbeat."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from distbench.case.entry import Entry
from distbench.case.stages import ARMS, STAGES
from distbench.distributed.flight_recorder import Group, as_line
from distbench.distributed.heartbeat import Position
from distbench.distributed.waits import KINDS
from distbench.errors import Verdict
from distbench.launcher import hang
from distbench.launcher.hang import find_hang
from distbench.launcher.job import Job, NodeLayout
from distbench.launcher.postmortem import LaunchFailure
from distbench.launcher.supervisor import _TICK_S
from tests.cases import tiny_case
from tests.hosts import ROOT

LIMIT_S = 2.0


def make_job(out: Path, layout: NodeLayout | None = None) -> Job:
    entries = tuple(Entry(name="", case=tiny_case(3, seed=seed, timeout=LIMIT_S), sources={}) for seed in range(2))
    return Job(entries=entries, out=str(out), supervised=True, layout=layout)


def ago(seconds: float) -> int:
    return time.monotonic_ns() - int(seconds * 1e9)


def at(  # noqa: PLR0913 - all of a position that matters
    stage: str,
    seconds: float,
    *,
    step: int = 0,
    arm: str = "",
    case_index: int = 0,
    waits: str = "",
    entered: int = 0,
    device: int = -1,
) -> Position:
    """Position recorded some seconds ago, of a rank whose process is not examined."""
    kind = KINDS.index("all_to_all")
    places = case_index, ARMS.index(arm), STAGES.index(stage), ago(seconds), 0, step
    return Position(*places, KINDS.index(waits), entered, kind, device)


def told(ending: LaunchFailure | None) -> tuple[Verdict, list[int | None], str]:
    assert ending is not None
    return ending.verdict, [reason.rank for reason in ending.reasons], ending.reasons[0].message


def test_stage_that_ended_is_not_held_against_its_limit_as_the_docs_say(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert find_hang(job, {rank: at("combine", LIMIT_S / 2) for rank in range(3)}, ago(90)) is None
    assert find_hang(job, {rank: at("combine", LIMIT_S + 1) for rank in range(3)}, ago(90)) is not None
    text = (ROOT / "docs" / "suites.md").read_text()
    assert f"looked at every {_TICK_S:g} s" in " ".join(text.split())


def test_rank_that_has_not_started_is_blamed_for_the_hang(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    seen = {0: at("start", 5), 2: at("start", LIMIT_S + 0.5)}
    verdict, ranks, message = told(find_hang(job, seen, ago(90)))
    assert (verdict, ranks) == (Verdict.HANG, [1])
    assert message.startswith("rank 1 had not begun 2.5 s after the others, allowed are 2.0 s; rank 0, 2 waited for it")
    assert find_hang(job, seen | {2: at("start", LIMIT_S - 0.5)}, ago(90)) is None


def test_hang_limit_before_the_first_rank_allows_for_loading_torch(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert find_hang(job, {}, ago(LIMIT_S + 50)) is None
    verdict, ranks, message = told(find_hang(job, {}, ago(LIMIT_S + 61)))
    assert (verdict, ranks) == (Verdict.HANG, [0, 1, 2])
    assert message.startswith("rank 0, rank 1, rank 2 had not begun 63.0 s after the launch, allowed are 62.0 s")


def test_ranks_on_other_nodes_get_their_own_time_to_load_torch(tmp_path: Path) -> None:
    layout = NodeLayout(nodes=3, node=0, nproc=1, host="node0", port=1, launch=1)
    job = make_job(tmp_path, layout)
    assert find_hang(job, {0: at("start", LIMIT_S + 50)}, ago(90)) is None
    assert told(find_hang(job, {0: at("start", LIMIT_S + 61)}, ago(90)))[1] == [1, 2]


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> dict[int, str]:
    """Stacks of ranks by rank, as the request for them returns."""
    answers: dict[int, str] = {}
    monkeypatch.setattr(hang, "dump_stacks", lambda *_: answers)
    return answers


@pytest.mark.usefixtures("stacks")
def test_rank_that_records_no_wait_is_blamed_for_the_hang(tmp_path: Path) -> None:
    seen = {rank: at("combine", 3, arm="control", step=4, entered=7, waits="gather") for rank in range(3)}
    assert told(find_hang(make_job(tmp_path), seen, ago(90)))[1] == [0, 1, 2]
    seen[2] = at("combine", 3, arm="control", step=4, entered=7)
    _, ranks, message = told(find_hang(make_job(tmp_path), seen, ago(90)))
    assert ranks == [2]
    assert message.startswith("rank 2 stood in control/combine for 3")
    assert message.endswith("; rank 0, 1 waited for it in gather")


@pytest.mark.usefixtures("stacks")
def test_rank_with_fewest_collectives_is_blamed_if_no_rank_records_a_wait(tmp_path: Path) -> None:
    """On a device a collective returns at once, and a rank waits wherever it next needs the device."""
    seen = {rank: at("dispatch", 3, arm="truncated", step=4, entered=9, device=rank) for rank in range(3)}
    seen[1] = at("dispatch", 4, arm="truncated", step=4, entered=8, device=1)
    _, ranks, message = told(find_hang(make_job(tmp_path), seen, ago(90)))
    assert ranks == [1]
    assert message.startswith("rank 1 stood in truncated/dispatch for 4")
    assert message.endswith("; rank 0, 2 waited for it in all_to_all (collective 9 of the case on a device)")


def test_flight_recorder_names_the_rank_whose_device_is_late(tmp_path: Path, stacks: dict[int, str]) -> None:
    seen = {rank: at("check", 3, arm="padded", step=4, entered=9, device=rank) for rank in range(3)}
    for rank, state in enumerate(("started", "scheduled", "started")):
        line = as_line([Group("0", 9, "a", 9, "nccl:all_to_all", state)])
        stacks[rank] = f"Thread 0x1 (most recent call first):\n{line}"
    _, ranks, message = told(find_hang(make_job(tmp_path), seen, ago(90)))
    assert ranks == [1]
    assert "; its device has not begun nccl:all_to_all 9 of NCCL group 0; rank 0, 2 waited for it in " in message
    stacks[0] = "no answer"
    assert told(find_hang(make_job(tmp_path), seen, ago(90)))[1] == [0, 1, 2]


def test_hang_after_the_last_case_fails_no_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang, "is_alive", lambda _: True)
    monkeypatch.setattr(hang, "dump_stacks", lambda *_: {})
    waits = ("", "end of the launch", "end of the launch")
    seen = {rank: at("done", 3, case_index=1, step=9, waits=waits[rank]) for rank in range(3)}
    ending = find_hang(make_job(tmp_path), seen, ago(90))
    assert told(ending)[1] == [0]
    assert ending is not None
    assert ending.case_index is None
    monkeypatch.setattr(hang, "is_alive", lambda _: False)
    assert find_hang(make_job(tmp_path), seen, ago(90)) is None


def test_ranks_outside_the_group_of_a_case_are_not_blamed_for_its_hang(
    tmp_path: Path,
) -> None:
    job = make_job(tmp_path)
    outside = at("start", 99, case_index=2)
    within = at("dispatch", LIMIT_S - 0.5, step=4, case_index=1)
    assert find_hang(job, {0: within, 1: within, 2: outside}, ago(90)) is None
    ending = find_hang(job, {0: at("done", 1), 1: at("done", 1), 2: outside}, ago(90))
    assert told(ending)[1] == [2]
    assert ending is not None
    assert ending.case_index is None


def test_rank_whose_signal_a_device_has_waited_for_in_vain_is_blamed_at_once(tmp_path: Path) -> None:
    first = msgspec.structs.replace(at("dispatch", 0.1, step=4, arm="truncated", waits="signal of a peer"), missing=2)
    late = msgspec.structs.replace(at("combine", 0.1, step=6, arm="truncated"), missing=1)
    seen = {0: first, 1: late, 2: at("check", 0.1, step=4, arm="truncated")}
    verdict, ranks, message = told(find_hang(make_job(tmp_path), seen, ago(90)))
    assert (verdict, ranks) == (Verdict.HANG, [1])
    assert message.startswith("rank 1 sent no signal in truncated/dispatch: devices of other ranks gave up waiting")
