"""Resources that a launch needs of a node: checked before a rank starts, in bytes and with the fix."""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import pytest

from distbench.cli import launching, main
from distbench.errors import LaunchFailed, Unsupported
from distbench.launcher import resources
from distbench.launcher.resources import allow_open_files, check_shared_memory, report_bytes
from tests.cases import tiny_case

# Lines of results.jsonl, in bytes, of passing cases of these shapes.
MEASURED = [
    ({"ep_size": 1}, 7_473),
    ({"ep_size": 8}, 18_600),
    ({"ep_size": 16}, 31_377),
    ({"ep_size": 4, "iterations": 100}, 26_794),
    ({"ep_size": 4, "iterations": 1000}, 117_161),
    ({"ep_size": 1, "iterations": 4000}, 261_309),
    ({"ep_size": 4, "repeats": 100}, 21_852),
    ({"ep_size": 4, "repeats": 1500}, 110_855),
]


@pytest.mark.parametrize(("shape", "measured"), MEASURED)
def test_estimated_report_bytes_bound_the_measured_ones_within_a_factor_of_two_and_a_half(
    shape: dict[str, Any], measured: int
) -> None:
    estimated = report_bytes([tiny_case(num_experts=16, **shape)])
    assert measured < estimated < 2.5 * measured
    assert report_bytes([tiny_case(num_experts=16, **shape)] * 3) == 3 * estimated


@pytest.fixture
def no_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launching, "preload_ranks", lambda: pytest.fail("ranks were started"))


@pytest.mark.parametrize(("ranks", "measured"), [(1, 57_344), (2, 65_536), (4, 81_920), (8, 114_688)])
def test_launch_with_too_little_shared_memory_is_refused(ranks: int, measured: int) -> None:
    with pytest.raises(Unsupported, match=rf"{ranks} ranks meet at semaphores.*; {measured} are free: .*--shm-size"):
        check_shared_memory(ranks, on_devices=False, free=measured)
    assert check_shared_memory(ranks, on_devices=False, free=2 * measured) == ()


def test_launch_with_little_shared_memory_for_nccl_gives_a_warning() -> None:
    (warning,) = check_shared_memory(8, on_devices=True, free=64 << 20)
    assert "67108864 bytes of /dev/shm are free, NCCL takes up to about 1079640064 for 8 ranks" in warning
    assert check_shared_memory(8, on_devices=True, free=2 << 30) == ()
    assert check_shared_memory(8, on_devices=False, free=64 << 20) == ()


def test_system_without_dev_shm_passes_the_shared_memory_check(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(resources, "_SHARED_MEMORY", tmp_path / "nowhere")
    assert check_shared_memory(8, on_devices=True) == ()


@pytest.mark.usefixtures("no_ranks")
def test_run_without_shared_memory_is_refused_before_a_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resources, "_free_bytes", lambda: 4096)
    assert main.main(["run", "--model=tiny", "--nproc=2", f"--out={tmp_path}"]) == 77
    assert "distbench: UNSUPPORTED: shared memory: 2 ranks meet at semaphores" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("local", "ranks", "measured"), [(1, 1, 33), (2, 2, 41), (4, 4, 56), (8, 8, 89), (16, 16, 161)]
)
def test_launch_with_too_low_a_file_limit_is_refused(local: int, ranks: int, measured: int) -> None:
    with pytest.raises(LaunchFailed, match=rf"open files: {local} ranks here take about \d+, {measured} are allowed"):
        allow_open_files(local, ranks, (measured, measured))
    allow_open_files(local, ranks, (measured, measured + 32))
    allow_open_files(local, ranks, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def test_needed_open_files_grow_with_the_total_number_of_ranks() -> None:
    with pytest.raises(LaunchFailed, match=r"take about 2120, 1024 are allowed; ulimit -Hn 2120"):
        allow_open_files(8, 1024, (1024, 1024))


def test_soft_file_limit_is_raised_to_what_a_launch_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    raised: list[tuple[int, tuple[int, int]]] = []
    monkeypatch.setattr(resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(resource, "setrlimit", lambda *arguments: raised.append(arguments))
    allow_open_files(8, 256)
    assert raised == []
    allow_open_files(8, 1024)
    assert raised == [(resource.RLIMIT_NOFILE, (2120, 4096))]


def test_more_ranks_than_one_process_can_start_are_refused() -> None:
    plenty = (1 << 20, 1 << 20)
    allow_open_files(124, 124, plenty)
    with pytest.raises(Unsupported, match="125 ranks on this node: one process starts at most 124"):
        allow_open_files(125, 125, plenty)


@pytest.mark.usefixtures("no_ranks")
def test_suite_with_too_low_a_file_limit_is_refused_before_a_rank_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (48, 48))
    assert main.main(["suite", "smoke", "--nproc=8", f"--out={tmp_path}"]) == 3
    assert capsys.readouterr().err.endswith(
        "distbench: LAUNCH_FAILED: open files: 8 ranks here take about 96, 48 are allowed; ulimit -Hn 96\n"
    )
    assert not (tmp_path / "results.jsonl").exists()
