"""The command line that launch/torchrun.sh runs, from a torchrun that prints its arguments."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "launch" / "torchrun.sh"
TWO_NODES = {"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "node0", "NPROC_PER_NODE": "4"}
MEETING = "OMP_NUM_THREADS=8 torchrun --nnodes=2 --nproc-per-node=4 --rdzv-backend=c10d"


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    write_command(tmp_path / "bin" / "torchrun", 'echo "OMP_NUM_THREADS=$OMP_NUM_THREADS torchrun $*"')
    write_command(tmp_path / "bin" / "nproc", "echo 32")
    chosen = 'echo "GLOO_SOCKET_IFNAME=eth7"; echo "NCCL_SOCKET_IFNAME=eth7"'
    interfaces = f'case "$*" in "-m distbench.launcher.nodes.interfaces node0 "*) {chosen}; exit;; esac'
    write_command(tmp_path / "bin" / "python", f"{interfaces}\necho ${{GPUS:-0}}")
    return tmp_path


def write_command(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def launch(venv: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.defpath, "VENV": str(venv), **variables}
    return subprocess.run([str(SCRIPT), *arguments], env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize(
    ("variables", "command"),
    [
        ({}, "OMP_NUM_THREADS=4 torchrun --nnodes=1 --nproc-per-node=8 --standalone"),
        ({"GPUS": "4"}, "OMP_NUM_THREADS=8 torchrun --nnodes=1 --nproc-per-node=4 --standalone"),
        ({"NPROC_PER_NODE": "64"}, "OMP_NUM_THREADS=1 torchrun --nnodes=1 --nproc-per-node=64 --standalone"),
        ({"OMP_NUM_THREADS": "3"}, "OMP_NUM_THREADS=3 torchrun --nnodes=1 --nproc-per-node=8 --standalone"),
        (
            {**TWO_NODES},
            f"{MEETING} --rdzv-endpoint=node0:29500 --rdzv-id=distbench --rdzv-conf=is_host=0",
        ),
        (
            {**TWO_NODES, "NODE_RANK": "0", "MASTER_PORT": "4000", "SLURM_JOB_ID": "17"},
            f"{MEETING} --rdzv-endpoint=node0:4000 --rdzv-id=17 --rdzv-conf=is_host=1",
        ),
    ],
)
def test_script_builds_the_torchrun_command_from_its_variables(
    venv: Path, variables: dict[str, str], command: str
) -> None:
    result = launch(venv, "--model", "tiny", "--out", "a b", **variables)
    assert result.stdout == f"{command} -m distbench run --model tiny --out a b\n"


@pytest.mark.parametrize(
    ("address", "host"), [("fd00::1", "fd00::1"), ("[fd00::1]", "fd00::1"), ("10.0.0.1", "10.0.0.1")]
)
def test_ipv6_address_is_bracketed_before_a_port_only(venv: Path, address: str, host: str) -> None:
    write_command(venv / "bin" / "python", f'[ "$3" = "{host}" ] && echo GLOO_SOCKET_IFNAME=eth7')
    write_command(venv / "bin" / "torchrun", 'echo "$GLOO_SOCKET_IFNAME $*"')
    told = launch(venv, **TWO_NODES | {"MASTER_ADDR": address}).stdout
    assert told.startswith("eth7 ")
    assert f" --rdzv-endpoint={f'[{host}]' if ':' in host else host}:29500 " in told


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        ((), "run"),
        (("--tokens", "3"), "run --tokens 3"),
        (("run", "--tokens", "3"), "run --tokens 3"),
        (("suite", "smoke", "--out", "x"), "suite smoke --out x"),
    ],
)
def test_script_starts_any_distbench_command(venv: Path, arguments: tuple[str, ...], command: str) -> None:
    assert launch(venv, *arguments).stdout.endswith(f"--standalone -m distbench {command}\n")


def test_script_sets_the_interface_that_routes_to_node_0_on_several_nodes(venv: Path) -> None:
    write_command(venv / "bin" / "torchrun", 'echo "$GLOO_SOCKET_IFNAME $NCCL_SOCKET_IFNAME"')
    assert launch(venv, **TWO_NODES).stdout == "eth7 eth7\n"
    assert launch(venv).stdout == " \n"


def test_rdzv_id_overrides_the_slurm_job_id(venv: Path) -> None:
    assert "--rdzv-id=mine " in launch(venv, **TWO_NODES, RDZV_ID="mine", SLURM_JOB_ID="17").stdout


def test_script_prints_its_chosen_settings(venv: Path) -> None:
    assert launch(venv).stderr == "torchrun.sh: 1 x 8 ranks, OMP_NUM_THREADS=4, --standalone\n"


@pytest.mark.parametrize(
    ("variables", "complaint"),
    [
        ({"NNODES": "0"}, "NNODES=0: allowed are integers from 1 to 65536"),
        ({"NNODES": "two"}, "NNODES=two: allowed are integers from 1 to 65536"),
        ({"NPROC_PER_NODE": "08"}, "NPROC_PER_NODE=08: allowed are integers from 1 to 1024"),
        ({**TWO_NODES, "NODE_RANK": "2"}, "NODE_RANK=2: allowed are integers from 0 to 1"),
        ({**TWO_NODES, "NODE_RANK": ""}, "NODE_RANK=unset: allowed are integers from 0 to 1"),
        ({**TWO_NODES, "MASTER_PORT": "65536"}, "MASTER_PORT=65536: allowed are integers from 1 to 65535"),
        ({**TWO_NODES, "MASTER_ADDR": ""}, "MASTER_ADDR=: needed with NNODES=2"),
    ],
)
def test_wrong_variable_is_refused_in_one_line(venv: Path, variables: dict[str, str], complaint: str) -> None:
    result = launch(venv, **variables)
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"torchrun.sh: {complaint}; set it ")
    assert result.stderr.count("\n") == 1


def test_missing_torchrun_is_refused_with_the_fix(tmp_path: Path) -> None:
    result = launch(tmp_path)
    assert (result.returncode, result.stderr) == (2, "torchrun.sh: torchrun: not found; run: make setup\n")


def test_script_help_names_every_variable(venv: Path) -> None:
    result = launch(venv, "-h")
    assert result.returncode == 0
    for name in ("NPROC_PER_NODE", "NNODES", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT", "RDZV_ID", "OMP_NUM_THREADS"):
        assert name in result.stdout
    assert "set -euo" not in result.stdout
