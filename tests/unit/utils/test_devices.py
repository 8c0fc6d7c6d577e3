"""Cases on accelerators, device locks of a launch, and doubts about a device's times."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distbench.errors import Unsupported
from distbench.launcher.preflight import check_case, check_devices
from distbench.utils import devices
from distbench.utils.devices import DeviceState, devices_to_hold, interpreted, runs_on_device
from tests.cases import tiny_case


@pytest.mark.parametrize(
    ("asked", "available", "local_ranks", "expected"),
    [("cpu", 8, 8, False), ("auto", 8, 8, True), ("auto", 7, 8, False), ("auto", 0, 1, False), ("cuda", 2, 2, True)],
)
def test_case_runs_on_devices_if_each_local_rank_has_its_own(
    asked: str, available: int, local_ranks: int, expected: bool
) -> None:
    assert runs_on_device(asked, available, local_ranks) is expected


def test_cuda_without_devices_is_refused_before_ranks_start() -> None:
    with pytest.raises(Unsupported, match="2 ranks on this node, torch sees 1 device;"):
        check_devices([tiny_case(2, device="auto"), tiny_case(2, device="cuda")], 2, available=1)
    assert Unsupported("").exit_code == 77


NVIDIA = ["GPU-a1", "GPU-b2", "GPU-c3", "GPU-d4"]
ROCM = [f"GPU-{number:016x}" for number in range(16, 24)]


@pytest.fixture
def node(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Setter of the variables that choose devices and of the drivers' answers."""

    def set_up(nvidia: list[str], rocm: list[str], **chosen: str) -> None:
        for vendor in ("CUDA", "HIP", "ROCR"):
            monkeypatch.delenv(f"{vendor}_VISIBLE_DEVICES", raising=False)
        for vendor, value in chosen.items():
            monkeypatch.setenv(f"{vendor}_VISIBLE_DEVICES", value)
        monkeypatch.setattr(devices, "_nvidia_uuids", lambda: nvidia)
        monkeypatch.setattr(devices, "_rocm_uuids", lambda: rocm)

    return set_up


@pytest.mark.parametrize(
    ("chosen", "held"),
    [
        ({}, ("cuda:GPU-a1", "cuda:GPU-b2")),
        ({"CUDA": "3,1"}, ("cuda:GPU-d4", "cuda:GPU-b2")),
        ({"CUDA": "GPU-a1, GPU-b"}, ("cuda:GPU-a1", "cuda:GPU-b2")),
        ({"CUDA": "MIG-7,MIG-8"}, ("cuda:MIG-7", "cuda:MIG-8")),
        ({"CUDA": "3,1", "HIP": "0,1"}, ("cuda:GPU-d4", "cuda:GPU-b2")),
    ],
)
def test_lock_name_of_a_device_does_not_depend_on_cuda_visible_devices(
    node: Callable[..., None], chosen: dict[str, str], held: tuple[str, ...]
) -> None:
    node(NVIDIA, [], **chosen)
    assert devices_to_hold(["cpu", "cuda"], 2, 2) == held
    assert devices_to_hold(["cpu"], 2, 2) == ()


@pytest.mark.parametrize(
    ("chosen", "numbers"),
    [
        ({}, (0, 1)),
        ({"ROCR": "4,5"}, (4, 5)),
        ({"ROCR": "4,5", "HIP": "1,0"}, (5, 4)),
        ({"ROCR": "4,5,6", "CUDA": "1,2"}, (5, 6)),
        ({"HIP": "3,2", "CUDA": "0,1"}, (3, 2)),
        ({"ROCR": f"{ROCM[7]},{ROCM[6]}", "HIP": "0,1"}, (7, 6)),
    ],
)
@pytest.mark.parametrize("uuids", [ROCM, []], ids=["UUIDs", "numbers"])
def test_hip_visible_devices_index_into_rocr_visible_devices(
    node: Callable[..., None], chosen: dict[str, str], numbers: tuple[int, int], uuids: list[str]
) -> None:
    node([], uuids, **chosen)
    held = devices_to_hold(["auto"], 2, 2)
    named = uuids or [ROCM[number] if "GPU-" in chosen.get("ROCR", "") else str(number) for number in range(8)]
    assert held == tuple(f"cuda:{named[number]}" for number in numbers)


def test_uuids_of_rocm_devices_are_read_from_the_kernel_driver(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(devices, "_KFD_NODES", tmp_path)

    def held(unique: dict[int, int]) -> tuple[str, ...]:
        for number in range(11):
            (tmp_path / str(number)).mkdir(exist_ok=True)
            told = f"simd_count 8\nsimd_per_cu 4\nunique_id {unique[number]}" if number in unique else "simd_count 0"
            (tmp_path / str(number) / "properties").write_text(f"{told}\n")
        return devices_to_hold(["auto"], 2, 2)

    assert held({2: 255, 10: 16}) == (f"cuda:GPU-{255:016x}", f"cuda:GPU-{16:016x}")
    assert held({2: 255, 10: 255}) == held({2: 255, 10: 0}) == ("cuda:0", "cuda:1")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"policy": "guard", "experts": "triton"}, "guard reads total_recv on the host"),
        ({"device": "cpu", "experts": "triton"}, "need a device"),
        ({"device": "cuda"}, "reference: they read the live-row count on the host"),
    ],
)
def test_case_that_no_graph_can_capture_is_refused_with_the_reason(values: dict[str, str], words: str) -> None:
    with pytest.raises(Unsupported, match=words):
        check_case(tiny_case(2, graph=True, **values))


@pytest.mark.parametrize(
    ("lines", "expected"), [(["81000", "500"], 500 << 20), (["81000", "[N/A]"], None), (["81000"], None)]
)
def test_free_device_memory_is_that_of_the_fullest_device(
    monkeypatch: pytest.MonkeyPatch, lines: list[str], expected: int | None
) -> None:
    told = {("--query-gpu=memory.free", "3,GPU-1f"): lines}
    monkeypatch.setattr(devices, "_smi", lambda query, names: told[query, names])
    assert devices.free_device_bytes(("cuda:3", "cuda:GPU-1f")) == expected


def test_free_device_memory_without_a_management_program_is_read_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda _: None)
    monkeypatch.setattr(devices, "_ask", lambda command, _: ["17"] if "mem_get_info" in command[-1] else [])
    assert devices.free_device_bytes(("cuda:0",)) == 17
    monkeypatch.setattr(devices, "_ask", lambda *_: [])
    assert devices.free_device_bytes(("cuda:0",)) is None


@pytest.mark.gpu
def test_free_device_memory_is_read_on_a_real_device() -> None:
    free = devices.free_device_bytes(("cuda:0",))
    assert free is not None
    assert 1 << 30 < free <= torch.cuda.get_device_properties(0).total_memory


def refuse(_: int) -> int:
    message = "amdsmi does not seem to be installed"
    raise ModuleNotFoundError(message)


@pytest.mark.parametrize(
    ("clock", "expected"),
    [
        (lambda _: 1500, {"clock_mhz": 1500, "celsius": 61, "power_watts": 700}),
        (lambda _: 0, {"clock_mhz": None, "celsius": 61, "power_watts": 700}),
        (refuse, {"clock_mhz": None, "celsius": 61, "power_watts": 700}),
    ],
    ids=["told", "unknown", "refused"],
)
def test_rocm_device_state_is_read_through_torch(
    monkeypatch: pytest.MonkeyPatch, clock: Callable[[int], int], expected: dict[str, Any]
) -> None:
    monkeypatch.setattr(torch.version, "hip", "7.0")
    for name, answer in (
        ("get_device_name", lambda _: "MI300X"),
        ("get_device_properties", lambda _: SimpleNamespace(clock_rate=2_100_000)),
        ("clock_rate", clock),
        ("temperature", lambda _: 61),
        ("power_draw", lambda _: 700),
    ):
        monkeypatch.setattr(torch.cuda, name, answer)
    state = devices.device_state(0)
    assert state == DeviceState(name="MI300X", max_clock_mhz=2100, **expected)
    told = "its clock is 1500 MHz of 2100" if expected["clock_mhz"] else "its clock cannot be read here"
    assert state.doubts() == [told]


def test_doubts_about_a_device_state_name_their_cause() -> None:
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


_INTERPRETED = "; on the CPU {} needs TRITON_INTERPRET=1"


@pytest.mark.parametrize(
    ("parts", "needs"),
    [
        ({}, ""),
        ({"transport": "symmetric"}, _INTERPRETED.format("transport symmetric")),
        (
            {"transport": "symmetric", "experts": "triton"},
            _INTERPRETED.format("transport symmetric") + _INTERPRETED.format("experts triton"),
        ),
        ({"transport": "mori"}, "; on the CPU transport mori needs --emulate"),
        ({"transport": "mori", "emulate": True}, ""),
    ],
)
def test_advice_of_the_cpu_names_what_parts_for_gpus_need_there(
    monkeypatch: pytest.MonkeyPatch, parts: dict[str, Any], needs: str
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    case = tiny_case(2, device="cuda", **parts)
    with pytest.raises(Unsupported) as refusal:
        check_devices([case], 2, available=0)
    assert str(refusal.value).endswith(f"; use --device cpu or auto{needs}")


@pytest.mark.parametrize("word", ["1", "true", "ON", "yes"])
def test_interpreter_is_known_by_each_of_triton_s_words_and_needed_no_more(
    monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", word)
    assert interpreted()
    assert not interpreted({"TRITON_INTERPRET": "0"})
    with pytest.raises(Unsupported, match=r"use --device cpu or auto$"):
        check_devices([tiny_case(2, device="cuda", transport="symmetric")], 2, available=0)
