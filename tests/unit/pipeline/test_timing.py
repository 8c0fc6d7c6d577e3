"""Warm-up: untimed iterations are counted one by one and keep the device busy during clock queries; the cache flush."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from distbench.distributed.session import Session
from distbench.pipeline import timing
from distbench.pipeline.timing import Timer, flushing_memory
from distbench.utils.devices import DeviceState
from tests.cases import tiny_case


def test_each_untimed_iteration_leaves_a_heartbeat() -> None:
    told: list[str] = []
    heartbeat = SimpleNamespace(mark=told.append)
    session = cast(Session, SimpleNamespace(device=torch.device("cpu"), heartbeat=heartbeat, group=None))

    def layer(_: Any) -> Tensor:
        told.append("ran")
        return torch.zeros(1, 1, dtype=torch.bfloat16)

    Timer(session, tiny_case(iterations=0, warmup=3)).time(layer, torch.zeros(1, 1, dtype=torch.bfloat16))
    assert told == ["timing", "ran"] * 3


def test_last_arm_keeps_the_device_busy_during_the_state_query(monkeypatch: pytest.MonkeyPatch) -> None:
    busy, told, ran = threading.Event(), [], 0

    def device_state(_: int) -> DeviceState:
        told.append(busy.wait(10))
        return DeviceState(name="asked while busy")

    def layer(_: Any) -> Tensor:
        nonlocal ran
        ran += 1
        busy.set()
        return torch.zeros(1, 1)

    monkeypatch.setattr(timing, "device_state", device_state)
    session = SimpleNamespace(
        device=torch.device("cpu"), heartbeat=SimpleNamespace(mark=lambda _: None), on_any_rank=lambda value: value
    )
    state = Timer(cast(Session, session), tiny_case()).state_while(layer)
    assert state.name == "asked while busy"
    assert told == [True]
    assert ran >= 20


@pytest.mark.parametrize(
    ("hip", "l2", "written"), [(None, 50 << 20, 200 << 20), ("7.0", 4 << 20, 1 << 30), ("7.0", 512 << 20, 2 << 30)]
)
def test_flush_exceeds_the_l2_size_that_rocm_reports(
    monkeypatch: pytest.MonkeyPatch, hip: str | None, l2: int, written: int
) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(L2_cache_size=l2))
    assert flushing_memory(torch.device("meta")).nbytes == written
