"""`distbench cluster` on emulated hosts: a broken link, a host that loses its network; and inside a Slurm job."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm import Slurm
from tests.end_to_end.launches import wait_until, write_suite
from tests.hosts import LONG, ROOT, Hosts, hosts

pytestmark = [pytest.mark.skipif(not LONG, reason="long: make test-cluster"), pytest.mark.timeout(300)]


def launcher(net: Hosts) -> str:
    """Launcher command that runs its arguments on one of the hosts."""
    script = net.folder / "on_host.py"
    commands = {f"host{number}": net.on(number, []) for number in range(net.count)}
    script.write_text(
        f"import os, sys\ncommands = {json.dumps(commands)}\n"
        "command = [*commands[sys.argv[1]], *sys.argv[2:]]\nos.execvp(command[0], command)\n"
    )
    return json.dumps([sys.executable, str(script), "{host}"])


def start(net: Hosts, suite: Path, *more: str) -> subprocess.Popen[str]:
    nodes = ",".join(f"host{number}" for number in range(net.count))
    command = ["cluster", str(suite), "--nodes", nodes, "--launcher", launcher(net), "--nproc", "1"]
    return subprocess.Popen(
        [sys.executable, "-m", "distbench", *command, "--out", str(suite.with_name("out")), *more],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def document(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "out" / "cluster.json").read_text())
    return found


def test_broken_link_is_named_and_neither_of_its_nodes(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(1))
    with hosts(3, tmp_path) as net:
        net.part(1, 2)
        running = start(net, suite, "--plan", "nodes,pairs", "--join-timeout", "8")
        told, _ = running.communicate(timeout=200)
    found = document(tmp_path)
    assert running.returncode == 3, told
    assert [(one["kind"], one["nodes"]) for one in found["findings"]] == [("link", ["host1", "host2"])], told
    assert "NODES_MISSING: node 1 did not join within 8 s" in found["findings"][0]["evidence"]
    assert found["defects"] == []
    assert [trial["verdict"] for trial in found["trials"]].count("PASS") == 5
    assert "slow nodes: 3 nodes pass, at least 5 are needed" in told


def test_host_that_loses_its_network_during_a_trial_is_named_within_seconds(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(2000))
    with hosts(2, tmp_path) as net:
        running = start(net, suite, "--plan", "pairs")
        results = tmp_path / "out" / "trials" / "pairs" / "host0+host1" / "results.jsonl"
        assert wait_until(lambda: results.exists() and results.read_bytes().count(b"\n") > 1, 60)
        net.cut(1)
        cut = time.monotonic()
        told, _ = running.communicate(timeout=120)
        assert time.monotonic() - cut < 60
    (trial,) = document(tmp_path)["trials"]
    assert (running.returncode, trial["verdict"]) == (3, "RANK_FAULT"), told
    assert "host host1 (node 1, rank 1 to 1) is gone or no longer answers" in trial["reason"]


def test_cluster_plan_runs_inside_a_slurm_job(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(1))
    with hosts(2, tmp_path) as net:
        slurm = Slurm(net, tmp_path)
        plan = f"{sys.executable} -m distbench cluster {suite} --nproc 1 --plan nodes,pairs --out {tmp_path}/out"
        number = slurm.submit("--wrap", plan)
        assert wait_until(lambda: slurm.state(number) in ("COMPLETED", "FAILED", "CANCELLED"), 120), slurm.log(number)
        assert slurm.state(number) == "COMPLETED", slurm.log(number)
    found = document(tmp_path)
    assert found["nodes"] == ["host0", "host1"]
    assert [trial["verdict"] for trial in found["trials"]] == ["PASS"] * 3
    assert [found["defects"], found["emulated"]] == [[], False]
