"""`distbench doctor`: each line from fake facts, and the probe on this node."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distbench.cli.main import main
from distbench.launcher import locks
from distbench.launcher.locks import hold
from distbench.tools.doctor.checks import check_node
from distbench.tools.doctor.findings import PATHS, exit_code
from distbench.tools.doctor.probe import Node, held_locks, probe
from distbench.tools.doctor.vendors import Network
from distbench.transport.mori.config import heap_size, plan_mori
from tests.cases import tiny_case

READY = Node(
    torch="2.11.0+rocm7.1",
    flavour="rocm",
    devices=("gfx950",) * 8,
    peers=True,
    rocm="7.1.0",
    hipcc="/opt/rocm/bin/hipcc",
    packages={"amd-mori": "1.2.4", "amd-aiter": "0.1.19"},
    nics={"mlx5_0": "ACTIVE"},
    memlock=None,
    open_files=65536,
    shm_total=64 << 30,
    shm_free=64 << 30,
)


def findings(network: Network | None = None, case: dict[str, Any] | None = None, **changed: Any) -> list[Any]:
    node = msgspec.structs.replace(READY, **changed)
    return check_node(node, tiny_case(8, transport="mori", **(case or {})), network or Network())


def test_complete_node_is_ready_for_every_path() -> None:
    found = findings()
    assert [finding for finding in found if finding.level != "ok"] == []
    assert [exit_code(found, path) for path in PATHS] == [0, 0, 0]
    assert len({finding.topic for finding in found}) >= 16


def packages(mori: str, of_aiter: str, nightly: str = "") -> dict[str, Any]:
    installed = {"amd-mori": mori, "amd-mori-nightly": nightly, "amd-aiter": of_aiter}
    return {"packages": {name: version for name, version in installed.items() if version}}


LINES = [
    (
        {"environ": {"GLOO_SOCKET_IFNAME": "eth9"}, "interfaces": ("lo", "eth0")},
        *("interfaces", "missing", "interfaces with an address here: lo, eth0", (2, 2, 2)),
    ),
    (
        {"environ": {"NCCL_SOCKET_IFNAME": "^lo,eth"}, "interfaces": ("lo", "eth0")},
        *("interfaces", "missing", "NCCL finds no interface by it", (0, 2, 2)),
    ),
    ({"torch": ""}, "torch", "missing", "not installed", (2, 2, 2)),
    ({"torch": "! OSError: libamdhip64.so"}, "torch", "missing", "OSError: libamdhip64.so", (2, 2, 2)),
    ({"torch": "2.4.0"}, "torch", "degraded", "2.4.0", (1, 1, 1)),
    ({"devices": ()}, "accelerators", "missing", "torch sees none", (0, 2, 2)),
    ({"devices": ("gfx950",) * 4}, "accelerators", "degraded", "4 of gfx950", (0, 1, 1)),
    ({"flavour": "cpu"}, "accelerators", "missing", "built for the CPU", (0, 2, 2)),
    ({"flavour": "cuda"}, "ROCm", "missing", "cuda build", (0, 0, 2)),
    ({"flavour": "cuda", "peers": False}, "peer access", "degraded", "not between all", (0, 1, 2)),
    ({"peers": False}, "peer access", "missing", "not between all", (0, 2, 2)),
    ({"hipcc": ""}, "hipcc", "missing", "not in PATH", (0, 0, 2)),
    ({"devices": ("gfx90a",) * 8}, "gfx architecture", "missing", "gfx90a", (0, 0, 2)),
    (packages("", "0.1.19"), "mori", "missing", "not installed", (0, 0, 2)),
    (packages("1.2.2", "0.1.19"), "mori", "degraded", "amd-mori 1.2.2: no barrier", (0, 0, 1)),
    (packages("1.2.2+rocm7", "0.1.19"), "mori", "degraded", "1.2.2+rocm7: no barrier", (0, 0, 1)),
    (packages("unknown", "0.1.19"), "mori", "degraded", "unknown: not a version", (0, 0, 1)),
    (packages("1.2.4", "0.1.19", "1.2.5"), "mori", "degraded", "amd-mori-nightly 1.2.5 are both installed", (0, 0, 1)),
    (packages("1.2.4", ""), "aiter", "missing", "not installed", (0, 0, 2)),
    (packages("1.2.4", "0.1.20"), "aiter", "degraded", "#3997", (0, 0, 1)),
    (packages("1.2.4", "0.1.dev1+g123"), "aiter", "degraded", "no rules are known", (0, 0, 1)),
    ({"environ": {"MORI_SHMEM_HEAP_SIZE": "1K"}}, "heap", "missing", "1K: 1024 bytes, the case needs", (0, 0, 2)),
    ({"environ": {"MORI_SHMEM_HEAP_SIZE": "lots"}}, "heap", "missing", "no size; write for instance 6G", (0, 0, 2)),
    ({"environ": {"MORI_EP_COMM": "cco"}}, "case", "missing", "only the shmem backend", (0, 0, 2)),
    ({"environ": {"MORI_SHMEM_MODE": "vmm_heap"}}, "heap mode", "degraded", "vmm_heap", (0, 0, 1)),
    ({"environ": {"MORI_SHMEM_MODE": "Isolation"}}, "heap mode", "degraded", "Isolation", (0, 0, 1)),
    ({"memlock": 65536}, "ulimit -l", "degraded", "65536 bytes", (0, 0, 1)),
    ({"open_files": 1024}, "ulimit -n", "degraded", "1024", (1, 1, 1)),
    ({"shm_free": 64 << 20}, "shared memory", "degraded", "64 of 65536 MiB", (1, 1, 1)),
    ({"environ": {"SGLANG_MORI_MAX_INPUT_TOKEN": "5"}}, "environment", "degraded", "has no effect", (1, 1, 1)),
    *(
        ({"environ": {name: "1"}}, "environment", "degraded", f"{name}='1' changes kernels", (0, 0, 1))
        for name in ("AITER_ONLINE_TUNE", "AITER_FLYDSL_FORCE_REDUCE", "AITER_FLYDSL_EP_NO_FAKE_EXPERT")
    ),
    ({"locks": ("distbench-0-gpu-0.lock",)}, "locks", "degraded", "distbench-0-gpu-0.lock is held", (1, 1, 1)),
]


def test_blocks_of_intranode_are_clamped_to_the_compute_units() -> None:
    for case, level, found in (
        ({}, "ok", "IntraNode: rdma_block_num 0 of block_num 64"),
        ({"sglang_version": "0.5.20"}, "missing", "IntraNode: rdma_block_num 0 of block_num 80, 64 compute units"),
    ):
        (blocks,) = (finding for finding in findings(units=64, case=case) if finding.topic == "blocks")
        assert (blocks.level, blocks.found) == (level, found)


def test_isolation_heap_mode_is_ok_and_its_heap_size_is_not_checked() -> None:
    environ = {"MORI_SHMEM_MODE": "ISOLATION", "MORI_SHMEM_HEAP_SIZE": "1K"}
    found = {finding.topic: finding for finding in findings(environ=environ)}
    assert (found["heap mode"].level, found["heap mode"].found) == ("ok", "ISOLATION")
    assert found["heap"].level == "ok"
    assert found["heap"].found.startswith("none, MORI_SHMEM_MODE is ISOLATION; the case takes ")


def test_unused_variables_are_listed_as_ok() -> None:
    found = [
        finding for finding in findings(environ={"ATOM_X": "1", "MORI_RDMA_TC": "96"}) if "ATOM_X" in finding.found
    ]
    assert [(finding.level, finding.paths) for finding in found] == [("ok", ("mori",))]
    assert "MORI_RDMA_TC" not in found[0].found


@pytest.mark.parametrize("value", ["fp4", "nonsense"])
def test_dispatch_dtype_that_cannot_run_is_reported_as_missing(
    value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SGLANG_MORI_DISPATCH_DTYPE", value)
    monkeypatch.setattr("distbench.tools.doctor.probe.probe", lambda: READY)
    assert main(["doctor", "--for", "mori"]) == 2
    assert "missing   environment       env:SGLANG_MORI_DISPATCH_DTYPE" in capsys.readouterr().out


@pytest.mark.parametrize(("changed", "topic", "level", "found", "codes"), LINES)
def test_each_missing_requirement_is_reported_with_its_fix(
    changed: dict[str, Any], topic: str, level: str, found: str, codes: tuple[int, ...]
) -> None:
    lines = findings(**changed)
    wanting = [line for line in lines if line.topic == topic and line.level == level]
    assert wanting, lines
    assert found in wanting[0].found
    assert wanting[0].fix
    assert tuple(exit_code(lines, path) for path in PATHS) == codes


@pytest.mark.parametrize("found", [packages("1.2.20", "0.1.19"), packages("", "0.1.18+rocm7", "1.2.5.dev20261001")])
def test_package_versions_compare_numerically_under_either_distribution_name(found: dict[str, Any]) -> None:
    assert exit_code(findings(**found), "mori") == 0


@pytest.mark.parametrize("blocks", [(64, 0), (64, 64), (64, -8), (None, 64), (32, None)])
def test_rdma_block_counts_that_hang_are_reported_as_missing(blocks: tuple[int | None, int | None]) -> None:
    lines = findings(Network(nodes=2, block_num=blocks[0], rdma_block_num=blocks[1]))
    assert [line.topic for line in lines if line.level == "missing"] == ["blocks"]


@pytest.mark.parametrize(
    ("version", "kernel", "blocks", "wanting"),
    [
        ("1.2.2", "InterNodeV1", 42, ["blocks"]),
        ("1.2.2", "InterNodeV1", 40, []),
        ("1.2.2", "InterNodeV1LL", 42, []),
        ("1.2.4", "InterNodeV1", 42, []),
        ("1.2.5.dev20261001", "InterNodeV1", 42, []),
        ("nightly", "InterNodeV1", 42, ["blocks"]),
    ],
)
def test_rdma_block_counts_that_drop_rows_are_reported_for_affected_releases(
    version: str, kernel: str, blocks: int, wanting: list[str]
) -> None:
    lines = findings(Network(nodes=2, rdma_block_num=blocks), {"mori_kernel": kernel}, **packages(version, "0.1.19"))
    assert [line.topic for line in lines if line.level == "missing"] == wanting


def test_checked_block_counts_are_those_of_the_case() -> None:
    def told(network: Network, **case: Any) -> str:
        (line,) = [line for line in findings(network, case) if line.topic == "blocks"]
        return f"{line.level} {line.found}"

    assert told(Network()) == "ok IntraNode: rdma_block_num 0 of block_num 80"
    assert told(Network(nodes=2)) == "ok InterNodeV1LL: rdma_block_num 32 of block_num 64"
    assert told(Network(), mori_kernel="AsyncLL").startswith("ok AsyncLL: rdma_block_num 32")
    assert told(Network(), launch_mode="AUTO").startswith("degraded IntraNode: ")


def test_case_that_mori_cannot_run_gets_the_message_of_a_run() -> None:
    for case, found in (
        ({"mori_kernel": "IntraNodeLL", "topk": 9}, "topk = 9: IntraNodeLL loses the slots past 8"),
        ({"gpu_per_node": 4}, "gpu_per_node = 4: the launch has 8 of the case's ranks on each node"),
        ({"mori_kernel": "AsyncLL", "combine_quant": "fp4_blockwise"}, "fp4_blockwise: not with AsyncLL"),
    ):
        lines = [line for line in findings(case=case) if line.level == "missing"]
        assert [(line.topic, line.found.startswith(found) or found in line.found) for line in lines] == [("case", True)]
    (line,) = [
        one
        for one in findings(case={"combine_quant": "fp4_blockwise"}, devices=("gfx942",) * 8)
        if one.level == "missing"
    ]
    assert (line.topic, line.found) == ("combine", "fp4_blockwise on gfx942")


def test_fp8_format_of_another_device_gets_the_message_of_a_run() -> None:
    def told(fp8: str, device: str, **case: Any) -> list[tuple[str, str, str]]:
        lines = findings(case={"fp8_format": fp8} | case, devices=(device,) * 8)
        return [(line.topic, line.found, line.fix) for line in lines if line.level == "missing"]

    fix = "these compute with e4m3fnuz: add --fp8-format e4m3fnuz"
    assert told("e4m3fn", "gfx942", dispatch_dtype="fp8") == [("fp8", "e4m3fn on gfx942", fix)]
    assert told("e4m3fn", "gfx942") == []
    assert told("e4m3fnuz", "gfx942", combine_quant="fp8_blockwise") == []
    assert told("e4m3fn", "gfx950", dispatch_dtype="fp8") == []


def test_several_nodes_without_an_active_nic_are_not_ready() -> None:
    assert exit_code(findings(nics={"mlx5_0": "DOWN"}), "mori") == 0
    lines = findings(Network(nodes=2), nics={"mlx5_0": "DOWN"})
    assert [(line.topic, line.found) for line in lines if line.level == "missing"] == [("NICs", "mlx5_0 DOWN")]


def test_required_heap_equals_that_of_a_run() -> None:
    large = {"model": "deepseek-v3", "max_dispatch_tokens_per_rank": 32768}
    plan = plan_mori(tiny_case(8, transport="mori", **large), {})
    assert plan.heap_bytes > 4 << 30
    (line,) = [line for line in findings(case=large) if line.topic == "heap"]
    assert line.level == "ok"
    assert line.found.startswith(f"{heap_size(plan, {}, emulated=False)} bytes (MORI_SHMEM_HEAP_SIZE is not set")
    assert line.found.endswith(f"the case takes {plan.heap_bytes}")
    (line,) = [one for one in findings(case=large, environ={"MORI_SHMEM_HEAP_SIZE": "4G"}) if one.level == "missing"]
    assert line.topic == "heap"
    enough = line.fix.rpartition("=")[2]
    assert exit_code(findings(case=large, environ={"MORI_SHMEM_HEAP_SIZE": enough}), "mori") == 0


def test_held_device_locks_are_listed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "DEVICE_LOCKS", tmp_path)
    with hold(None, ("cuda:0", "cuda:1"), 0):
        pass
    with hold(None, ("cuda:1",), 0):
        assert held_locks(tmp_path) == ["distbench-cuda-1.lock"]
    assert held_locks(tmp_path) == []
    (tmp_path / "distbench-x.lock").symlink_to(tmp_path / "elsewhere")
    (found,) = held_locks(tmp_path)
    assert found.startswith("distbench-x.lock (lock ")


def test_installed_plugins_are_listed_with_their_packages() -> None:
    (fact,) = (one for one in findings(plugins=("transport acme (acme-distbench 0.1)",)) if one.topic == "plugins")
    assert fact.found == "transport acme (acme-distbench 0.1)"
    (fact,) = (one for one in findings() if one.topic == "plugins")
    assert (fact.level, fact.found) == ("ok", "none is installed")


def test_probe_of_this_node_succeeds() -> None:
    node = probe()
    assert node.torch
    assert node.open_files > 0
    assert node.flavour in {"cpu", "cuda", "rocm"}
    assert exit_code(check_node(node, tiny_case(2), Network()), "cpu") in {0, 1}


@pytest.mark.parametrize(("path", "code"), [("cpu", 0), ("cuda", 0), ("mori", 2)])
def test_doctor_command_exits_with_the_code_of_its_path(
    path: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):  # a launch in this process may have set them
        monkeypatch.delenv(name, raising=False)
    node = msgspec.structs.replace(READY, flavour="cuda", devices=("sm_90",) * 8, environ=dict(os.environ))
    monkeypatch.setattr("distbench.tools.doctor.probe.probe", lambda: node)
    assert main(["doctor", "--for", path]) == code
    words = {0: "ready", 2: "not usable"}
    assert capsys.readouterr().out.splitlines()[-1] == f"{words[code]} for {path}"


def test_doctor_json_contains_no_environment_variable(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "distbench.tools.doctor.probe.probe", lambda: msgspec.structs.replace(READY, environ={"SECRET": "word"})
    )
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    document = json.loads(out)
    assert (document["for"], document["exit_code"]) == ("mori", 0)
    assert "SECRET" not in out


def test_invalid_limit_in_the_environment_is_reported_and_exits_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distbench.tools.doctor.probe.probe", lambda: READY)
    monkeypatch.setenv("SGLANG_MORI_MOE_MAX_INPUT_TOKENS", "many")
    assert main(["doctor"]) == 2
    assert "SGLANG_MORI_MOE_MAX_INPUT_TOKENS" in capsys.readouterr().out


def test_doctor_reads_the_environment_for_the_mori_path(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("distbench.tools.doctor.probe.probe", lambda: READY)
    monkeypatch.setenv("SGLANG_MORI_COMBINE_DTYPE", "fp8")
    assert main(["doctor", "--for", "mori"]) == 0
    assert "fp8_blockwise" in capsys.readouterr().out
