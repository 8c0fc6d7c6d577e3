"""`--transport mori` as a user types it: emulated, and refused where the package is not there."""

from __future__ import annotations

import json
import socket
from pathlib import Path

from tests.end_to_end.launches import Bench
from tests.end_to_end.test_run import tiny


def test_emulated_and_said_so(tmp_path: Path) -> None:
    run = tiny(tmp_path, 4, "--transport", "mori", "--emulate", "--gpu-per-node", "2")
    assert (run.exit_code, run.report["verdict"]) == (0, "PASS")
    assert run.report["emulated"] is True
    assert run.report["stand_ins"] == ["distbench.emulation.mori for mori", "reference for aiter"]
    assert run.last_line.startswith("PASS (emulated: distbench.emulation.mori for mori, reference for aiter)")
    facts = run.report["transport"]
    assert (facts["kernel"], facts["nodes"], facts["launch_mode"]) == ("InterNodeV1", 2, "MANUAL")
    assert (facts["block_num"], facts["rdma_block_num"], facts["warp_num_per_block"]) == (64, 32, 8)
    assert facts["mori"].endswith("emulated")
    assert facts["heap_size"] >= facts["heap_bytes"]


def test_two_launched_nodes_are_two_nodes_to_mori(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{probe.getsockname()[1]}"
    shape = ("run", "--model", "tiny", "--transport", "mori", "--emulate", "--nproc", "2")
    nodes = ("--nnodes", "2", "--rdzv-endpoint", meeting)
    with Bench(tmp_path / "1", *shape, *nodes, "--node-rank", "1"), Bench(tmp_path / "0", *shape, *nodes) as node0:
        assert node0.finish() == 0, node0.stderr
    report = json.loads((tmp_path / "0" / "report.json").read_text())
    facts = report["transport"]
    assert (report["verdict"], facts["kernel"], facts["nodes"], facts["gpu_per_node"]) == ("PASS", "InterNodeV1", 2, 2)


def test_without_the_package_it_is_unsupported(tmp_path: Path) -> None:
    run = tiny(tmp_path, 4, "--transport", "mori")
    assert run.exit_code == 77
    assert run.stderr.startswith("distbench: UNSUPPORTED: transport mori: no package mori here")


def test_an_unknown_habit_is_refused(tmp_path: Path) -> None:
    run = tiny(tmp_path, 2, "--transport", "mori", "--emulate", "--mori-habits", "1.9")
    assert run.exit_code == 2
    assert "neither a release" in run.stderr


def test_the_suite_goes_as_expected_on_eight_ranks(tmp_path: Path) -> None:
    with Bench(tmp_path / "out", "suite", "mori", "--nproc", "8", "--quiet") as bench:
        assert bench.finish() == 0
        assert bench.summary["as_expected"] == bench.summary["cases"]
        assert bench.gone()
