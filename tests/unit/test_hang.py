"""Who stands still and who only waits for it: from positions and stacks, and before a rank has said a word."""

from __future__ import annotations

import time
from pathlib import Path
from types import CodeType

import filelock
import pytest

from distbench import hang
from distbench.breadcrumbs import ARMS, STAGES, Position
from distbench.emulation.mori import shmem
from distbench.errors import Verdict
from distbench.exchange.shared_memory import SharedMemory
from distbench.exchange.waiting import wait_for
from distbench.hang import find_hang, waits_for_peers
from distbench.job import Entry, Job, Spread
from distbench.postmortem import Ending
from distbench.session import Session
from tests.cases import tiny_case

OTHER_THREAD = """Thread 0x00007f3a (most recent call first):
  File "/site/torch/distributed/distributed_c10d.py", line 12 in barrier

"""
HEADER = "Current thread 0x00007f3b (most recent call first):\n"
GLOO = '  File "/site/torch/distributed/distributed_c10d.py", line 2990 in broadcast\n'
DEVICE = '  File "/site/torch/cuda/streams.py", line 231 in synchronize\n'
ASLEEP = '  File "/repo/tests/faulty_site/sitecustomize.py", line 40 in <lambda>\n'
LAYER = '  File "/repo/distbench/layer.py", line 40 in run_layer\n'
LIMIT_S = 2.0


def frame(code: CodeType) -> str:
    """Return a frame of that code as faulthandler writes it."""
    return f'  File "{code.co_filename}", line {code.co_firstlineno} in {code.co_name}\n'


@pytest.mark.parametrize(
    ("stack", "waits"),
    [
        (HEADER + GLOO + LAYER, True),
        (HEADER + DEVICE + LAYER, True),
        (HEADER + frame(wait_for.__code__) + LAYER, True),
        (HEADER + frame(SharedMemory._hear.__code__) + LAYER, True),  # noqa: SLF001 - the name is what is looked for
        (HEADER + frame(Session._wait_for.__code__) + LAYER, True),  # noqa: SLF001 - the name is what is looked for
        (HEADER + frame(filelock.BaseFileLock.acquire.__code__) + LAYER, True),
        (HEADER + frame(shmem._members.__code__) + LAYER, True),  # noqa: SLF001 - the name is what is looked for
        (HEADER + ASLEEP + LAYER, False),
        (HEADER + ASLEEP + GLOO, False),
        (OTHER_THREAD + HEADER + LAYER, False),
        (OTHER_THREAD + HEADER + GLOO, True),
        (HEADER + frame(Session.use.__code__) + LAYER, False),
        ("no answer; its process is in state T (T: stopped)", False),
        ("", False),
    ],
)
def test_a_stack_tells_whether_a_rank_waits_for_others(stack: str, *, waits: bool) -> None:
    assert waits_for_peers(stack) is waits


def make_job(out: Path, spread: Spread | None = None) -> Job:
    entries = tuple(Entry(name="", case=tiny_case(3, seed=seed, timeout=LIMIT_S), sources={}) for seed in range(2))
    return Job(entries=entries, out=str(out), supervised=True, spread=spread)


def ago(seconds: float) -> int:
    return time.monotonic_ns() - int(seconds * 1e9)


def at(stage: str, seconds: float, *, step: int = 0, arm: str = "", case_index: int = 0) -> Position:
    """Return a position that was taken some seconds ago, by a rank whose process is not looked at."""
    return Position(case_index, ARMS.index(arm), STAGES.index(stage), ago(seconds), 0, step)


def told(ending: Ending | None) -> tuple[Verdict, list[int | None], str]:
    assert ending is not None
    return ending.verdict, [reason.rank for reason in ending.reasons], ending.reasons[0].message


def test_a_rank_that_has_not_begun_is_behind_all_others(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    seen = {0: at("start", 5), 2: at("start", LIMIT_S + 0.5)}
    verdict, ranks, message = told(find_hang(job, seen, ago(90)))
    assert (verdict, ranks) == (Verdict.HANG, [1])
    assert message.startswith("rank 1 had not begun 2.5 s after the others, allowed are 2.0 s; rank 0, 2 waited for it")
    assert find_hang(job, seen | {2: at("start", LIMIT_S - 0.5)}, ago(90)) is None


def test_before_the_first_rank_torch_may_have_to_be_loaded(tmp_path: Path) -> None:
    job = make_job(tmp_path)
    assert find_hang(job, {}, ago(LIMIT_S + 50)) is None
    verdict, ranks, message = told(find_hang(job, {}, ago(LIMIT_S + 61)))
    assert (verdict, ranks) == (Verdict.HANG, [0, 1, 2])
    assert message.startswith("rank 0, rank 1, rank 2 had not begun 63.0 s after the launch, allowed are 62.0 s")


def test_ranks_of_other_nodes_load_torch_when_they_like(tmp_path: Path) -> None:
    spread = Spread(nodes=3, node=0, nproc=1, host="node0", port=1, launch=1)
    job = make_job(tmp_path, spread)
    assert find_hang(job, {0: at("start", LIMIT_S + 50)}, ago(90)) is None
    assert told(find_hang(job, {0: at("start", LIMIT_S + 61)}, ago(90)))[1] == [1, 2]


def test_those_that_wait_are_told_apart_from_those_that_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stacks = {0: HEADER + GLOO, 1: HEADER + frame(wait_for.__code__), 2: HEADER + ASLEEP}
    monkeypatch.setattr(hang, "dump_stacks", lambda *_: stacks)
    seen = {rank: at("combine", 3, arm="control", step=4) for rank in range(3)}
    _, ranks, message = told(find_hang(make_job(tmp_path), seen, ago(90)))
    assert ranks == [2]
    assert message.startswith("rank 2 stood in control/combine for 3")
    assert message.endswith("; rank 0, 1 waited for it")
    stacks[2] = HEADER + GLOO
    assert told(find_hang(make_job(tmp_path), seen, ago(90)))[1] == [0, 1, 2]


def test_a_stand_after_all_cases_falls_on_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hang, "is_alive", lambda _: True)
    monkeypatch.setattr(hang, "dump_stacks", lambda *_: {0: HEADER + ASLEEP, 1: HEADER + GLOO, 2: HEADER + GLOO})
    seen = {rank: at("done", 3, case_index=1, step=9) for rank in range(3)}
    ending = find_hang(make_job(tmp_path), seen, ago(90))
    assert told(ending)[1] == [0]
    assert ending is not None
    assert ending.case_index is None
    monkeypatch.setattr(hang, "is_alive", lambda _: False)
    assert find_hang(make_job(tmp_path), seen, ago(90)) is None


def test_ranks_outside_a_group_are_ahead_until_they_are_called_and_behind_no_case_after_the_last(
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
