"""A case on a real device, its times, and experts in a CUDA graph."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from distbench.utils.devices import count_devices
from tests.end_to_end.launches import Bench

pytestmark = pytest.mark.gpu
NEED_A_PEER = {"mask-ignored", "tail-counts-as-live", "live-count-of-an-expert"}
"""One rank alone has no expert of another, and no row behind a limit of what it receives."""


def test_case_on_one_device_passes_and_is_timed(tmp_path: Path) -> None:
    with Bench(
        tmp_path / "out", "run", "--nproc", "1", "--model", "tiny", "--device", "cuda", "--iterations", "30"
    ) as bench:
        assert bench.finish() == 0
        report = json.loads((bench.out / "report.json").read_text())
        assert report["ranks"][0]["device"] == "cuda:0"
        assert report["method"]["clock"] == "device events"
        assert report["timing"]["truncated"]["layer"]["iterations"] == 30


def test_more_ranks_than_devices_are_refused(tmp_path: Path) -> None:
    with Bench(tmp_path / "out", "run", "--nproc", "64", "--model", "tiny", "--device", "cuda") as bench:
        assert bench.finish() == 77
        assert "64 ranks on this node" in bench.stderr


@pytest.mark.parametrize("dispatch_dtype", ["bf16", "fp8"])
def test_case_with_triton_experts_in_a_graph_passes(tmp_path: Path, dispatch_dtype: str) -> None:
    flags = ("--model", "tiny", "--device", "cuda", "--experts", "triton", "--dispatch-dtype", dispatch_dtype)
    with Bench(tmp_path / "out", "run", "--nproc", "1", *flags, "--graph") as bench:
        assert bench.finish() == 0
        (rank,) = json.loads((bench.out / "report.json").read_text())["ranks"]
        assert rank["replays"]
        assert all(not wrong and not near for _, wrong, near in rank["replays"])


def test_mutants_around_the_triton_experts_are_detected(tmp_path: Path) -> None:
    """All but those that need a peer."""
    found = tmp_path / "found.json"
    parts = ("--nproc", "1", "--experts", "triton", "--device", "cuda", "--seeds", "1", "--json", found)
    kinds = ("--only", "tails,ids,order,dispatch,cut,activation")
    with Bench(tmp_path / "out", "mutants", *parts, *kinds, "--share", "0.9") as bench:
        code = bench.finish()
        assert "not tried here: gelu-for-silu patches the arithmetic of the reference experts" in bench.stdout
        told = json.loads(found.read_text())
        assert (told["alarms"], told["missing"]) == ([], [])
        assert {one["name"] for one in told["mutants"] if seen_less_than_always(one)} <= NEED_A_PEER
        assert code == 0


def seen_less_than_always(mutant: dict[str, str]) -> bool:
    return not mutant["equivalent"] and mutant["either"] != "always"


@pytest.fixture(scope="module")
def two_devices(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Return the flags of a case on two devices, whose kernels are compiled: no limit below is meant for that."""
    if count_devices() < 2:
        pytest.skip("needs two devices")
    flags = ("--nproc=2", "--model=tiny", "--device=cuda", "--experts=triton", "--policy=unchecked", "--limit=max-recv")
    with Bench(tmp_path_factory.mktemp("compiled") / "out", "run", *flags) as bench:
        assert bench.finish() == 0
    return flags


@pytest.mark.parametrize("stage", ["dispatch", "experts", "combine"])
@pytest.mark.parametrize("rank", [0, 1])
def test_hang_of_one_of_two_devices_is_named(
    tmp_path: Path, two_devices: tuple[str, ...], rank: int, stage: str
) -> None:
    limits = f"--stage-timeouts={stage}=5"
    with Bench(tmp_path / "out", "run", *two_devices, limits, f"--inject=hang:rank={rank},stage={stage}") as bench:
        assert bench.finish() == 3
        report = json.loads((bench.out / "report.json").read_text())
        assert report["verdict"] == "HANG"
        assert [(reason["rank"], reason["stage"]) for reason in report["reasons"]] == [(rank, stage)]
        assert report["reasons"][0]["message"].startswith(f"rank {rank} stood in truncated/{stage} for ")
        assert all("most recent call first" in stack for stack in report["stacks"].values())


@pytest.mark.parametrize("dispatch_dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("timed", [(), ("--graph", "--iterations", "30")])
def test_triton_experts_have_the_error_of_their_ideal(
    tmp_path: Path, dispatch_dtype: str, timed: tuple[str, ...]
) -> None:
    flags = ("--model=qwen3-30b-a3b", "--tokens=64", "--device=cuda", "--experts=triton", "--numerics=both")
    with Bench(tmp_path / "out", "run", "--nproc=1", *flags, f"--dispatch-dtype={dispatch_dtype}", *timed) as bench:
        assert bench.finish() == 0
        errors = json.loads((bench.out / "report.json").read_text())["errors"]
        assert errors
        assert all(0.98 <= ratio <= 1.02 for error in errors for ratio in error["ratio"])


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dispatch_dtype", ["bf16", "fp8"])
def test_sub_batches_overlap_on_a_communication_stream(tmp_path: Path, ranks: int, dispatch_dtype: str) -> None:
    """A missing wait between the streams would give rows or tokens of another pass, in some of these repeats."""
    if count_devices() < ranks:
        pytest.skip(f"needs {ranks} devices")
    flags = ("--model", "tiny", "--device", "cuda", "--experts", "triton", "--dispatch-dtype", dispatch_dtype)
    more = ("--two-batch-overlap", "--tokens", "61", "--repeats", "40", "--iterations", "30")
    with Bench(tmp_path / "out", "run", "--nproc", str(ranks), *flags, *more) as bench:
        assert bench.finish() == 0
        report = json.loads((bench.out / "report.json").read_text())
        assert report["transport"]["stream"] == "communication"
        assert [one["tokens"] for one in report["ranks"][0]["sub_batches"]] == [30, 31]
