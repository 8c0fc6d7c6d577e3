"""Which cases run on accelerators, which devices a launch holds, and what makes a device's times doubtful."""

from __future__ import annotations

from typing import Any

import pytest

from distbench.devices import DeviceState, devices_to_hold, runs_on_device
from distbench.errors import Unsupported
from distbench.preflight import check_case, check_devices
from tests.cases import tiny_case


@pytest.mark.parametrize(
    ("asked", "available", "local_ranks", "expected"),
    [("cpu", 8, 8, False), ("auto", 8, 8, True), ("auto", 7, 8, False), ("auto", 0, 1, False), ("cuda", 2, 2, True)],
)
def test_a_rank_takes_a_device_of_its_own(asked: str, available: int, local_ranks: int, expected: bool) -> None:
    assert runs_on_device(asked, available, local_ranks) is expected


def test_cuda_without_devices_is_refused_before_ranks_start() -> None:
    with pytest.raises(Unsupported, match="2 ranks on this node, torch sees 1 devices"):
        check_devices([tiny_case(2, device="auto"), tiny_case(2, device="cuda")], 2, available=1)
    assert Unsupported("").exit_code == 77


def test_held_devices_are_those_that_the_node_means(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert devices_to_hold(["auto"], 2, 4) == ("cuda:0", "cuda:1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,1")
    assert devices_to_hold(["cpu", "cuda"], 2, 2) == ("cuda:3", "cuda:1")
    assert devices_to_hold(["cpu"], 2, 2) == ()


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"policy": "guard", "experts": "triton"}, "guard reads total_recv on the host"),
        ({"device": "cpu", "experts": "triton"}, "need a device"),
        ({"device": "cuda"}, "reference: they read the live-row count on the host"),
    ],
)
def test_what_no_graph_can_hold_is_refused_with_the_reason(values: dict[str, str], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        check_case(tiny_case(2, graph=True, **values))


def test_doubts_name_what_was_seen() -> None:
    good: dict[str, Any] = {
        "name": "d",
        "clock_mhz": 1980,
        "max_clock_mhz": 1980,
        "throttled": False,
        "celsius": 50,
        "processes": 1,
    }
    assert DeviceState(**good).doubts() == []
    for bad in ({"clock_mhz": 900}, {"throttled": True}, {"celsius": 90}, {"processes": 2}, {"clock_mhz": None}):
        assert len(DeviceState(**good | bad).doubts()) == 1
