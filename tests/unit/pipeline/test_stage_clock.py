"""Durations of stages by arm, without those of checks, and the heartbeat's marks."""

from __future__ import annotations

import time

import pytest

from distbench.case.stages import LAYER_STAGES, Arm, Stage
from distbench.distributed.heartbeat import Heartbeat
from distbench.pipeline import stage_clock
from distbench.pipeline.stage_clock import StageClock
from tests.cases import tiny_case


def one_pass(clock: StageClock, heartbeat: Heartbeat, arm: str) -> None:
    heartbeat.arm = arm
    for stage in (Stage.DISPATCH, Stage.TRUNCATE, Stage.EXPERTS, Stage.CHECK, Stage.COMBINE, Stage.CHECK):
        clock.mark(stage)
    heartbeat.arm = ""


def test_durations_are_kept_by_arm_and_stage_without_checks() -> None:
    heartbeat = Heartbeat(None)
    clock = StageClock(heartbeat, tiny_case(), 0)
    for arm in (Arm.PADDED, Arm.TRUNCATED, Arm.TRUNCATED):
        one_pass(clock, heartbeat, arm)
    clock.mark(Stage.CHECK)
    counts = {arm: {stage: len(laps) for stage, laps in laps.items()} for arm, laps in clock.durations_us.items()}
    assert counts == {"padded": dict.fromkeys(LAYER_STAGES, 1), "truncated": dict.fromkeys(LAYER_STAGES, 2)}
    assert heartbeat.position().place == "check"


def test_duration_is_that_of_the_stage_and_not_of_the_next_one(monkeypatch: pytest.MonkeyPatch) -> None:
    moments = iter((1000, 4000, 9000))
    monkeypatch.setattr(time, "perf_counter_ns", lambda: next(moments))
    heartbeat = Heartbeat(None)
    clock = StageClock(heartbeat, tiny_case(), 0)
    heartbeat.arm = Arm.PADDED
    for stage in (Stage.DISPATCH, Stage.TRUNCATE, Stage.EXPERTS):
        clock.mark(stage)
    assert clock.durations_us == {"padded": {"dispatch": [3.0], "truncate": [5.0]}}


def test_only_the_first_durations_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage_clock, "_LAPS", 2)
    heartbeat = Heartbeat(None)
    clock = StageClock(heartbeat, tiny_case(), 0)
    for _ in range(3):
        one_pass(clock, heartbeat, Arm.CONTROL)
    assert [len(laps) for laps in clock.durations_us["control"].values()] == [2, 2, 2, 2]


def test_jitter_is_a_seeded_wait_before_each_stage_that_no_duration_has(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    waits: dict[int, list[float]] = {0: [], 1: []}

    def sleep(seconds: float) -> None:
        now[0] += seconds * 1e9
        waits[rank].append(seconds)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter_ns", lambda: now[0])
    for rank in (0, 1, 0, 1):
        heartbeat = Heartbeat(None)
        clock = StageClock(heartbeat, tiny_case(jitter=40.0), rank)
        one_pass(clock, heartbeat, Arm.PADDED)
        assert clock.durations_us == {"padded": {stage: [0.0] for stage in LAYER_STAGES}}
    for found in waits.values():
        assert found[:6] == found[6:]
        assert len(set(found)) == 6
        assert all(0 <= wait < 0.04 for wait in found)
    assert waits[0] != waits[1]
