"""`distbench doctor`: each line, from faked facts; the probe itself on this node."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distbench import locks
from distbench.cli import main
from distbench.commands import doctor as command
from distbench.doctor.checks import check_node
from distbench.doctor.findings import PATHS, exit_code
from distbench.doctor.probe import Node, held_locks, probe
from distbench.doctor.vendors import Network, heap_bytes, parse_size
from distbench.locks import hold
from tests.cases import tiny_case

READY = Node(
    torch="2.11.0+rocm7.1",
    flavour="rocm",
    devices=("gfx950",) * 8,
    peers=True,
    rocm="7.1.0",
    hipcc="/opt/rocm/bin/hipcc",
    packages={"mori": "1.2.4", "aiter": "0.1.19"},
    nics={"mlx5_0": "ACTIVE"},
    memlock=None,
    open_files=65536,
    shm_total=64 << 30,
    shm_free=64 << 30,
)


def findings(network: Network | None = None, case: dict[str, Any] | None = None, **changed: Any) -> list[Any]:
    node = msgspec.structs.replace(READY, **changed)
    return check_node(node, tiny_case(8, **(case or {})), network or Network())


def test_a_node_that_has_everything_is_ready_for_all() -> None:
    found = findings()
    assert [finding for finding in found if finding.level != "ok"] == []
    assert [exit_code(found, path) for path in PATHS] == [0, 0, 0]
    assert len({finding.topic for finding in found}) >= 16


LINES = [
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
    ({"packages": {"aiter": "0.1.19"}}, "mori", "missing", "not installed", (0, 0, 2)),
    ({"packages": {"mori": "1.2.2", "aiter": "0.1.19"}}, "mori", "degraded", "1.2.2: no barrier", (0, 0, 1)),
    ({"packages": {"mori": "1.2.4"}}, "aiter", "missing", "not installed", (0, 0, 2)),
    ({"packages": {"mori": "1.2.4", "aiter": "0.1.20"}}, "aiter", "degraded", "#3997", (0, 0, 1)),
    ({"packages": {"mori": "1.2.4", "aiter": "0.0.3"}}, "aiter", "missing", "no rules are known", (0, 0, 2)),
    ({"environ": {"MORI_SHMEM_HEAP_SIZE": "1K"}}, "heap", "missing", "1024 bytes (MORI_SHMEM_HEAP_SIZE)", (0, 0, 2)),
    ({"environ": {"MORI_SHMEM_HEAP_SIZE": "lots"}}, "heap", "missing", "is no size", (0, 0, 2)),
    ({"environ": {"MORI_SHMEM_MODE": "vmm_heap"}}, "heap mode", "degraded", "vmm_heap", (0, 0, 1)),
    ({"memlock": 65536}, "ulimit -l", "degraded", "65536 bytes", (0, 0, 1)),
    ({"open_files": 1024}, "ulimit -n", "degraded", "1024", (1, 1, 1)),
    ({"shm_free": 64 << 20}, "shared memory", "degraded", "64 of 65536 MiB", (1, 1, 1)),
    ({"environ": {"SGLANG_MORI_MAX_INPUT_TOKEN": "5"}}, "environment", "degraded", "has no effect", (1, 1, 1)),
    ({"environ": {"AITER_ONLINE_TUNE": "1"}}, "environment", "degraded", "changes kernels", (0, 0, 1)),
    ({"locks": ("distbench-0-gpu-0.lock",)}, "locks", "degraded", "distbench-0-gpu-0.lock is held", (1, 1, 1)),
]


@pytest.mark.parametrize(("changed", "topic", "level", "found", "codes"), LINES)
def test_each_lack_is_told_with_its_fix(
    changed: dict[str, Any], topic: str, level: str, found: str, codes: tuple[int, ...]
) -> None:
    lines = findings(**changed)
    wanting = [line for line in lines if line.topic == topic and line.level == level]
    assert wanting, lines
    assert found in wanting[0].found
    assert wanting[0].fix
    assert tuple(exit_code(lines, path) for path in PATHS) == codes


@pytest.mark.parametrize("blocks", [(64, 0), (64, 64), (64, 12), (64, -8)])
def test_rdma_blocks_that_drop_rows_or_hang(blocks: tuple[int, int]) -> None:
    lines = findings(Network(block_num=blocks[0], rdma_block_num=blocks[1]))
    assert [line.topic for line in lines if line.level == "missing"] == ["rdma_block_num"]


def test_several_nodes_need_a_nic() -> None:
    assert exit_code(findings(nics={"mlx5_0": "DOWN"}), "mori") == 0
    lines = findings(Network(nodes=2), nics={"mlx5_0": "DOWN"})
    assert [(line.topic, line.found) for line in lines if line.level == "missing"] == [("NICs", "mlx5_0 DOWN")]


def test_the_heap_is_held_against_the_case() -> None:
    large = {"model": "deepseek-v3", "max_dispatch_tokens_per_rank": 16384}
    assert heap_bytes(tiny_case(8, **large)) > 4 << 30
    (line,) = [line for line in findings(case=large) if line.level == "missing"]
    assert line.topic == "heap"
    enough = line.fix.rpartition("=")[2]
    assert exit_code(findings(case=large, environ={"MORI_SHMEM_HEAP_SIZE": enough}), "mori") == 0


@pytest.mark.parametrize(
    ("text", "size"),
    [("1024", 1024), ("6G", 6 << 30), ("512MiB", 512 << 20), ("2kb", 2048), ("", None), ("-1", None), ("1.5G", None)],
)
def test_sizes_as_mori_reads_them(text: str, size: int | None) -> None:
    assert parse_size(text) == size


def test_held_locks_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "DEVICE_LOCKS", tmp_path)
    with hold(None, ("cuda:0", "cuda:1"), 0):
        pass
    with hold(None, ("cuda:1",), 0):
        assert held_locks(tmp_path) == ["distbench-cuda-1.lock"]
    assert held_locks(tmp_path) == []
    (tmp_path / "distbench-x.lock").symlink_to(tmp_path / "elsewhere")
    (found,) = held_locks(tmp_path)
    assert found.startswith("distbench-x.lock (lock ")


def test_this_node_can_be_looked_at() -> None:
    node = probe()
    assert node.torch
    assert node.open_files > 0
    assert node.flavour in {"cpu", "cuda", "rocm"}
    assert exit_code(check_node(node, tiny_case(2), Network()), "cpu") in {0, 1}


@pytest.mark.parametrize(("path", "code"), [("cpu", 0), ("cuda", 0), ("mori", 2)])
def test_the_command(path: str, code: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    node = msgspec.structs.replace(READY, flavour="cuda", devices=("sm_90",) * 8, environ=dict(os.environ))
    monkeypatch.setattr(command, "probe", lambda: node)
    assert main(["doctor", "--for", path]) == code
    words = {0: "ready", 2: "not usable"}
    assert capsys.readouterr().out.splitlines()[-1] == f"{words[code]} for {path}"


def test_the_command_in_json_keeps_the_environment_to_itself(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "probe", lambda: msgspec.structs.replace(READY, environ={"SECRET": "word"}))
    assert main(["doctor", "--json"]) == 0
    out = capsys.readouterr().out
    document = json.loads(out)
    assert (document["for"], document["exit_code"]) == ("mori", 0)
    assert "SECRET" not in out


def test_a_bad_limit_in_the_environment_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "probe", lambda: READY)
    monkeypatch.setenv("SGLANG_MORI_MOE_MAX_INPUT_TOKENS", "many")
    assert main(["doctor"]) == 2
    assert "SGLANG_MORI_MOE_MAX_INPUT_TOKENS" in capsys.readouterr().out
