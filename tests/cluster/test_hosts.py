"""Several hosts, each with its own agent and supervisor: a verdict with host names, late hosts, lost hosts, slow links.

The small part runs always; DISTBENCH_CLUSTER=1, as `make test-cluster` sets it, runs the rest.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from tests.end_to_end.launches import faulty, wait_until, write_suite
from tests.hosts import LONG, PORT, ROOT, Hosts, hosts

only_long = pytest.mark.skipif(not LONG, reason="long: make test-cluster")
SHAPES = list(product((2, 3, 4), (1, 2, 3, 4)))


def start_all(net: Hosts, suite: Path, nproc: int, **environ: str) -> list[Any]:
    out = suite.with_name("out")
    experts = str(net.count * nproc * 2)
    arguments = ("suite", suite, "--nproc", str(nproc), "--out", out, "--num-experts", experts)
    return [net.start(number, *arguments, **environ) for number in range(net.count)]


def reports(folder: Path) -> dict[str, Any]:
    path = folder / "out" / "results.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {report["name"]: report for report in map(json.loads, lines)}


def host_of(report: dict[str, Any]) -> list[str]:
    return [rank["host"] for rank in report["ranks"]]


def assert_interface(net: Hosts, name: str) -> None:
    """Assert that every host printed `interface` as its choice."""
    told = [net.log(number).read_text() for number in range(net.count)]
    assert all(f"GLOO_SOCKET_IFNAME={name}, NCCL_SOCKET_IFNAME={name}\n" in one for one in told)


@pytest.mark.parametrize(("count", "nproc"), SHAPES if LONG else [(2, 2)])
def test_suite_over_all_hosts_passes_and_reports_name_the_hosts(tmp_path: Path, count: int, nproc: int) -> None:
    suite = write_suite(tmp_path / "suite.json", range(2))
    with hosts(count, tmp_path) as net:
        running = start_all(net, suite, nproc)
        assert [one.wait(500) for one in running] == [0] * count
        assert_interface(net, "eth0")
    found = reports(tmp_path)
    assert [report["verdict"] for report in found.values()] == ["PASS"] * 2
    expected = [f"host{number}" for number in range(count) for _ in range(nproc)]
    assert all(host_of(report) == expected for report in found.values())


@only_long
def test_ranks_use_the_interface_that_routes_to_node_0(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(1))
    with hosts(2, tmp_path) as net:
        net.meeting = 1
        running = start_all(net, suite, 1)
        assert [one.wait(500) for one in running] == [0, 0]
        assert_interface(net, "eth1")


def test_host_that_loses_its_network_is_named_and_no_process_is_left(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(2000))
    with hosts(2, tmp_path) as net:
        node0, node1 = start_all(net, suite, 1)
        assert wait_until(lambda: len(reports(tmp_path)) >= 2, 60)
        cut = time.monotonic()
        net.cut(1)
        before = reports(tmp_path)
        assert [node0.wait(500), node1.wait(500)] == [3, 3]
        assert time.monotonic() - cut < 40
        assert wait_until(lambda: not net.processes(0) and not net.processes(1), 5)
        told = net.log(1).read_text()
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "host host1 (node 1, rank 1 to 1) is gone or no longer answers" in summary["stopped"]
    found = {name: report["verdict"] for name, report in reports(tmp_path).items()}
    assert {found[name] for name in before} == {"PASS"}
    assert list(found.values()) == ["PASS"] * (len(found) - 1) + ["RANK_FAULT"]
    assert summary["verdicts"] == {"PASS": len(found) - 1, "RANK_FAULT": 1}
    assert "NODE_LOST: node 0 at 10.77.0.1:29500 no longer answers" in told


@pytest.mark.parametrize("number", [0, 1])
def test_rank_that_dies_is_named_with_its_host_and_the_suite_continues(tmp_path: Path, number: int) -> None:
    if number == 0 and not LONG:
        pytest.skip("long: make test-cluster")
    suite = write_suite(tmp_path / "suite.json", range(3))
    fault = faulty(f"{number}:1:control/experts:kill", once=tmp_path / "once")
    with hosts(2, tmp_path) as net:
        running = start_all(net, suite, 1, **fault)
        assert [one.wait(500) for one in running] == [3, 3]
    found = reports(tmp_path)
    assert [report["verdict"] for report in found.values()] == ["PASS", "RANK_FAULT", "PASS"]
    (reason,) = found["seed=1"]["reasons"]
    assert reason["rank"] == number
    assert f"rank {number} ended by SIGKILL in control/experts" in reason["message"]
    assert f"on host host{number}" in reason["message"]


@only_long
@pytest.mark.parametrize("number", [0, 1])
def test_rank_that_hangs_is_named_with_its_host(tmp_path: Path, number: int) -> None:
    suite = write_suite(tmp_path / "suite.json", range(3), timeout=3)
    fault = faulty(f"{number}:1:control/experts:sleep", once=tmp_path / "once")
    with hosts(2, tmp_path) as net:
        running = start_all(net, suite, 1, **fault)
        assert [one.wait(90) for one in running] == [3, 3]
    found = reports(tmp_path)
    assert [report["verdict"] for report in found.values()] == ["PASS", "HANG", "PASS"]
    (reason,) = found["seed=1"]["reasons"]
    assert reason["rank"] == number
    assert f"on host host{number}" in reason["message"]


@only_long
def test_host_whose_processes_are_all_killed_is_named(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(2000))
    with hosts(3, tmp_path) as net:
        running = start_all(net, suite, 1)
        assert wait_until(lambda: len(reports(tmp_path)) >= 2, 60)
        for pid in net.processes(2):
            os.kill(pid, signal.SIGKILL)
        assert [one.wait(500) for one in running[:2]] == [3, 3]
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "host host2 (node 2, rank 2 to 2)" in summary["stopped"]


@only_long
def test_launch_waits_for_hosts_that_join_late(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(1))
    arguments = ("suite", suite, "--nproc", "1", "--out", tmp_path / "out", "--num-experts", "6")
    with hosts(3, tmp_path) as net:
        running = []
        for number in (2, 0, 1):
            running.append(net.start(number, *arguments))
            time.sleep(5)
        assert [one.wait(500) for one in running] == [0, 0, 0]
    assert host_of(reports(tmp_path)["seed=0"]) == ["host0", "host1", "host2"]


@only_long
def test_host_that_never_joins_is_named(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(1))
    arguments = ("suite", suite, "--nproc", "1", "--out", tmp_path / "out", "--join-timeout", "4")
    with hosts(3, tmp_path) as net:
        running = [net.start(number, *arguments) for number in (0, 2)]
        assert [one.wait(500) for one in running] == [3, 3]
        assert "NODES_MISSING: node 1 did not join within 4 s" in net.log(0).read_text()


@only_long
def test_torchrun_script_runs_a_suite_over_the_interface_that_routes_to_node_0(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(2))
    with hosts(2, tmp_path) as net:
        variables = {"NNODES": "2", "NPROC_PER_NODE": "1", "MASTER_ADDR": net.address(0, 1), "MASTER_PORT": str(PORT)}
        command = [str(ROOT / "launch" / "torchrun.sh"), "suite", str(suite), "--out", str(tmp_path / "out")]
        variables["VENV"] = sys.prefix
        running = [net.start_command(number, command, **variables, NODE_RANK=str(number)) for number in range(2)]
        assert [one.wait(500) for one in running] == [0, 0], net.log(0).read_text()
        assert_interface(net, "eth1")
    found = reports(tmp_path)
    assert [report["verdict"] for report in found.values()] == ["PASS"] * 2
    assert sorted(host_of(found["seed=0"])) == ["host0", "host1"]


@only_long
def test_slow_link_changes_times_and_no_verdict(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(2))
    with hosts(2, tmp_path) as net:
        net.slow(1)
        running = start_all(net, suite, 2)
        assert [one.wait(500) for one in running] == [0, 0]
    found = reports(tmp_path)
    assert [report["verdict"] for report in found.values()] == ["PASS"] * 2
    assert all(report["timing"]["wall_s"] > 0.2 for report in found.values())


@only_long
@pytest.mark.parametrize("numbers", [(0, 1), (0,)])
def test_sigterm_of_a_scheduler_keeps_finished_results_and_leaves_no_process(
    tmp_path: Path, numbers: tuple[int, ...]
) -> None:
    suite = write_suite(tmp_path / "suite.json", range(2000))
    with hosts(2, tmp_path) as net:
        running = start_all(net, suite, 1)
        assert wait_until(lambda: len(reports(tmp_path)) >= 2, 60)
        for number in numbers:
            running[number].send_signal(signal.SIGTERM)
        assert [one.wait(30) for one in running] == [143, 143 if 1 in numbers else 3]
        assert wait_until(lambda: not net.processes(0) and not net.processes(1), 5)
    assert {report["verdict"] for report in reports(tmp_path).values()} == {"PASS"}
