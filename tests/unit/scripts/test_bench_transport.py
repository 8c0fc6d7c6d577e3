"""Timing in scripts/bench_transport.py: ranks synchronise after the wait, and transport and bare take turns."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

SCRIPT = Path(__file__).parents[3] / "scripts" / "bench_transport.py"


@pytest.fixture
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT), run_name="bench_transport")


def test_ranks_synchronise_after_the_device_wait(script: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []

    class Event:
        def __init__(self, *, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            told.append("event")

        def synchronize(self) -> None:
            told.append("wait")

        def elapsed_time(self, _: Event) -> float:
            return 0.25

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda _: told.append("sleep"))
    monkeypatch.setattr(dist, "all_reduce", lambda *_, **__: told.append("all_reduce"))
    session = SimpleNamespace(device=torch.device("cpu"), group=None)
    assert script["device_us"](session, lambda: told.append("work")) == 250.0
    assert told == ["sleep", "all_reduce", "event", "work", "event", "wait"]


def test_transport_and_bare_collectives_are_timed_in_turn_after_a_barrier(script: dict[str, Any]) -> None:
    told: list[str] = []

    def clock(_: object, work: str) -> float:
        told.append(work)
        return float(len(told))

    steps = [script["Step"]("dispatch", "a", "b"), script["Step"]("combine", "c", "d")]
    assert script["_iteration"](None, steps, clock, 0) == [1, 2, 3, 4]
    assert script["_iteration"](None, steps, clock, 1) == [6, 5, 8, 7]
    assert told == [*"abcd", *"badc"]
