"""launch/slurm.sbatch under a real Slurm with two nodes: the verdict, and the results after scancel and preemption."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.cluster.slurm import Slurm
from tests.end_to_end.launches import wait_until, write_suite
from tests.hosts import ROOT, Hosts, hosts

SCRIPT = str(ROOT / "launch" / "slurm.sbatch")

pytestmark = [
    pytest.mark.skipif(os.environ.get("DISTBENCH_CLUSTER") != "1", reason="long: make test-cluster"),
    pytest.mark.timeout(300),
]


@pytest.fixture
def net(tmp_path: Path) -> Iterator[Hosts]:
    with hosts(2, tmp_path) as made:
        yield made


def results(folder: Path) -> list[dict[str, Any]]:
    path = folder / "out" / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def ended(slurm: Slurm, number: str, *states: str) -> Callable[[], bool]:
    return lambda: slurm.state(number) in states


def ranks_left(net: Hosts) -> list[int]:
    """Process ids of distbench on the hosts."""
    pids = [pid for number in range(net.count) for pid in net.processes(number)]
    return [pid for pid in pids if b"distbench" in _command(pid) and b"slurm.sbatch" not in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        content = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
    return b"" if any(name in content for name in (b"munged", b"slurmd", b"slurmctld", b"slurmstepd")) else content


def test_a_slurm_job_ends_with_a_verdict_and_names_its_hosts(net: Hosts, tmp_path: Path) -> None:
    slurm = Slurm(net, tmp_path)
    suite = write_suite(tmp_path / "suite.json", range(2))
    number = slurm.submit(SCRIPT, "suite", str(suite), NPROC_PER_NODE="2")
    assert wait_until(ended(slurm, number, "COMPLETED", "FAILED", "CANCELLED"), 90), slurm.log(number)
    assert slurm.state(number) == "COMPLETED", slurm.log(number)
    assert [report["verdict"] for report in results(tmp_path)] == ["PASS", "PASS"]
    assert [rank["host"] for rank in results(tmp_path)[0]["ranks"]] == ["host0", "host0", "host1", "host1"]
    assert "2 x 2 ranks on host[0-1], meeting at host0:" in slurm.log(number)


def test_exit_code_of_a_failing_case_is_that_of_the_slurm_job(net: Hosts, tmp_path: Path) -> None:
    slurm = Slurm(net, tmp_path)
    more = ("--max-dispatch-tokens-per-rank", "64", "--limit", "max-recv-1", "--policy", "unchecked")
    number = slurm.submit(SCRIPT, "run", "--model", "tiny", *more, NPROC_PER_NODE="1")
    assert wait_until(ended(slurm, number, "COMPLETED", "FAILED", "CANCELLED"), 90), slurm.log(number)
    assert (slurm.state(number), slurm.exit_code(number)) == ("FAILED", 1), slurm.log(number)


@pytest.mark.parametrize(
    ("node_timeout", "states", "code"),
    [(300, ("FAILED", "COMPLETING"), 3), (5, ("NODE_FAIL",), 0)],  # COMPLETING for as long as Slurm counts on host1
)
def test_host_that_loses_its_network_is_named_and_the_slurm_job_ends(
    net: Hosts, tmp_path: Path, node_timeout: int, states: tuple[str, ...], code: int
) -> None:
    slurm = Slurm(net, tmp_path, node_timeout=node_timeout)
    suite = write_suite(tmp_path / "suite.json", range(2000))
    number = slurm.submit(SCRIPT, "suite", str(suite), NPROC_PER_NODE="1")
    assert wait_until(lambda: len(results(tmp_path)) >= 2, 90), slurm.log(number)
    net.cut(1)
    assert wait_until(ended(slurm, number, *states), 90), slurm.state(number) + slurm.log(number)
    assert slurm.exit_code(number) == code
    assert "host host1 (node 1, rank 1 to 1) is gone or no longer answers" in slurm.log(number)


def test_scancel_keeps_finished_results_and_leaves_no_process(net: Hosts, tmp_path: Path) -> None:
    slurm = Slurm(net, tmp_path)
    suite = write_suite(tmp_path / "suite.json", range(2000))
    number = slurm.submit(SCRIPT, "suite", str(suite), NPROC_PER_NODE="1")
    assert wait_until(lambda: len(results(tmp_path)) >= 2, 90), slurm.log(number)
    slurm.ask("scancel", number)
    assert wait_until(ended(slurm, number, "CANCELLED"), 40), slurm.state(number)
    assert wait_until(lambda: not ranks_left(net), 20), slurm.log(number)
    assert {report["verdict"] for report in results(tmp_path)} == {"PASS"}
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert "SIGTERM" in summary["stopped"]


def test_preempted_slurm_job_resumes_with_its_finished_results(net: Hosts, tmp_path: Path) -> None:
    slurm = Slurm(net, tmp_path)
    suite = write_suite(tmp_path / "suite.json", range(60))
    number = slurm.submit("--partition=low", SCRIPT, "suite", str(suite), NPROC_PER_NODE="1")
    assert wait_until(lambda: len(results(tmp_path)) >= 2, 90), slurm.log(number)
    other = slurm.ask("sbatch", "--parsable", "--nodes=2", "--partition=high", "--exclusive", "--output=/dev/null",
                      "--wrap", "sleep 3").split()[-1]  # fmt: skip
    assert wait_until(ended(slurm, other, "COMPLETED"), 90), slurm.state(other)
    has_ended, count = ended(slurm, number, "COMPLETED", "FAILED", "CANCELLED"), -1
    while not wait_until(has_ended, 180):  # Slurm requeues after two minutes; then results have to arrive
        assert len(results(tmp_path)) > count, slurm.log(number)
        count = len(results(tmp_path))
    assert slurm.state(number) == "COMPLETED", slurm.log(number)
    found = results(tmp_path)
    assert len({report["name"] for report in found}) == len(found) == 60
    assert {report["verdict"] for report in found} == {"PASS"}
    assert not ranks_left(net)
