"""`--transport mori` as a user types it: emulated, and unsupported without the package."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.in_process import tiny
from tests.end_to_end.launches import ROOT, Bench, FreshBench, wait_until
from tests.faulty_site.unguarded import MISTAKEN


def test_emulated_mori_passes_and_is_reported_as_emulated(tmp_path: Path) -> None:
    run = tiny(tmp_path, 4, "--transport", "mori", "--emulate", "--gpu-per-node", "2")
    assert (run.exit_code, run.report["verdict"]) == (0, "PASS")
    assert run.report["emulated"] is True
    assert run.report["stand_ins"] == ["distbench.transport.mori.emulated for mori", "reference for aiter"]
    assert run.last_line.startswith("PASS (emulated: distbench.transport.mori.emulated for mori, reference for aiter)")
    facts = run.report["transport"]
    assert (facts["kernel"], facts["nodes"], facts["launch_mode"]) == ("InterNodeV1", 2, "MANUAL")
    assert (facts["block_num"], facts["rdma_block_num"], facts["warp_num_per_block"]) == (64, 32, 8)
    assert facts["mori"].endswith("emulated")
    assert facts["heap_size"] >= facts["heap_bytes"]


def test_receive_bound_between_nodes_keeps_the_whole_buffer(tmp_path: Path) -> None:
    shape = ("--tokens", "16", "--transport", "mori", "--emulate", "--max-dispatch-tokens-per-rank", "512")
    run = tiny(tmp_path, 4, *shape, "--gpu-per-node", "2", SGLANG_MORI_RECV_BOUND="1")
    assert (run.exit_code, run.report["limit"]["effective"], run.report["limit"]["source"]) == (0, None, "off")
    assert "InterNodeV1 is none of IntraNode and AsyncLL" in run.report["warnings"][0]
    run = tiny(tmp_path, 4, *shape, SGLANG_MORI_RECV_BOUND="1", MORI_SHMEM_MODE="ISOLATION", MORI_SHMEM_HEAP_SIZE="1K")
    assert (run.exit_code, run.report["limit"]["effective"]) == (0, 64)


def test_mori_sees_two_nodes_if_two_are_launched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATOM_X", "1")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{probe.getsockname()[1]}"
    shape = ("run", "--model", "tiny", "--transport", "mori", "--emulate", "--nproc", "2")
    nodes = ("--nnodes", "2", "--rdzv-endpoint", meeting)
    with (
        Bench(tmp_path / "1", *shape, *nodes, "--node-rank", "1") as node1,
        Bench(tmp_path / "0", *shape, *nodes) as node0,
    ):
        assert node0.finish() == 0, node0.stderr
        assert node1.finish() == 0
        assert node1.stderr.count("node 1: set and not used by this case: ATOM_X=1") == 1
    report = json.loads((tmp_path / "0" / "report.json").read_text())
    facts = report["transport"]
    assert (report["verdict"], facts["kernel"], facts["nodes"], facts["gpu_per_node"]) == ("PASS", "InterNodeV1", 2, 2)
    assert sum(warning.count("ATOM_X=1") for warning in report["warnings"]) == 1


def test_mori_transport_without_the_package_is_unsupported(tmp_path: Path) -> None:
    run = tiny(tmp_path, 4, "--transport", "mori")
    assert run.exit_code == 77
    assert run.stderr.startswith("distbench: UNSUPPORTED: transport mori: no package mori here")


def test_unknown_mori_habit_is_refused(tmp_path: Path) -> None:
    run = tiny(tmp_path, 2, "--transport", "mori", "--emulate", "--mori-habits", "1.9")
    assert run.exit_code == 2
    assert "neither a release" in run.stderr


def test_mori_suite_ends_as_expected_on_eight_ranks(tmp_path: Path) -> None:
    with Bench(tmp_path / "out", "suite", "mori", "--nproc", "8", "--quiet") as bench:
        assert bench.finish() == 0
        assert bench.summary["as_expected"] == bench.summary["cases"]
        assert wait_until(bench.gone, 2)


OVERFLOW: dict[str, Any] = {"routing": "local", "prealloc_max_recv_tokens": 12}
MISTAKEN_IDS: dict[str, Any] = {"mori_kernel": "InterNodeV1", "gpu_per_node": 2, "topk": 2, "seed": MISTAKEN}
TEN_SLOTS: dict[str, Any] = {"mori_kernel": "IntraNodeLL", "topk": 10, "num_experts": 16}
CAPPED: dict[str, Any] = {"tokens": 8, "prealloc_max_recv_tokens": 32}
FAR: dict[str, Any] = {"hidden_size": 1024, "max_dispatch_tokens_per_rank": 32768}
LATE: dict[str, Any] = {"mori_habits": "no-constructor-barrier", "stage_timeouts": "dispatch=4"}
UNGUARDED: dict[str, tuple[dict[str, Any], str, str]] = {
    "slots past the eighth are lost": (TEN_SLOTS, "BASELINE_WRONG", "padded, dispatch: "),
    "all slots are looked at": (TEN_SLOTS | {"mori_habits": "ll-all-slots"}, "PASS", ""),
    "other ids in combine, refused": (MISTAKEN_IDS, "RANK_FAULT", "but this rank dispatched 16 tokens"),
    "other ids in combine, taken": (
        MISTAKEN_IDS | {"mori_habits": "no-row-guard"},
        "BASELINE_WRONG",
        "combine: tokens",
    ),
    "pushed past a capped buffer": (CAPPED, "PASS", ""),
    "pushed past the heap": (CAPPED | FAR, "RANK_FAULT", "ended by SIGABRT in padded/combine"),
    "overflow, nothing asserts it": (OVERFLOW, "BASELINE_WRONG", "4 received rows did not reach the experts"),
    "overflow of another kernel, nothing asserts it": (
        OVERFLOW | {"mori_kernel": "AsyncLL", "mori_habits": "no-overflow-assert"},
        "BASELINE_WRONG",
        "4 received rows did not reach the experts",
    ),
    "overflow, asserted": (
        OVERFLOW | {"mori_habits": "intranode-overflow-assert"},
        "RANK_FAULT",
        "ended by SIGABRT in padded/dispatch",
    ),
    "received once": ({"mori_habits": "stale-receive"}, "CORRUPT", "control"),
    "pushed once": ({"mori_habits": "stale-push"}, "CORRUPT", "control"),
    "written once": ({"mori_habits": "stale-output"}, "CORRUPT", "control"),
    "no barrier after construction": (LATE, "HANG", "rank 1"),
}


def test_each_mori_habit_without_guards_ends_in_its_verdict(tmp_path: Path) -> None:
    parts = {"transport": "mori", "emulate": True, "max_dispatch_tokens_per_rank": 64}
    defaults = {"model": "tiny", "numerics": "exact"} | parts
    cases = [{"name": name, "expect": verdict} | values for name, (values, verdict, _) in UNGUARDED.items()]
    suite = tmp_path / "quirks.json"
    suite.write_text(json.dumps({"defaults": defaults, "include": cases}))
    command = ("suite", suite, "--nproc", "4", "--quiet", "--max-faults", "9")
    site = {"PYTHONPATH": f"{ROOT}/tests/faulty_site:{ROOT}", "DISTBENCH_TEST_UNGUARDED": "1"}
    with FreshBench(tmp_path / "out", *command, **site) as bench:  # its own process is unguarded too
        bench.finish()
        assert bench.verdicts == {name: verdict for name, (_, verdict, _) in UNGUARDED.items()}, bench.stderr
        for report in bench.reports:
            assert UNGUARDED[report["name"]][2] in json.dumps([report["reasons"], report["diagnosis"]])
