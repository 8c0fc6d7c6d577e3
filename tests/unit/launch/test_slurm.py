"""Arguments that launch/slurm.sbatch passes to `distbench`, from an srun that prints them; and its examples."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from distbench.case.suite import load_suite, select
from distbench.case.suite_file import builtin_suites
from distbench.cli.main import _parser
from distbench.cli.options import case_flags
from tests.hosts import ROOT

SCRIPT = ROOT / "launch" / "slurm.sbatch"
JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}


def launch(folder: Path, *arguments: str, **variables: str) -> list[str]:
    """Arguments of `distbench` on the job's nodes."""
    lines = printed(folder, *arguments, **variables)
    return lines[lines.index("task") + 2 :]


def printed(folder: Path, *arguments: str, **variables: str) -> list[str]:
    """Lines that the script and srun print."""
    for name, text in (
        ("srun", 'printf "%s\\n" "$DISTBENCH_SECRET" "$@"'),
        ("scontrol", "echo n1"),
        ("distbench", ":"),
    ):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {"PATH": os.defpath, "VENV": str(folder), "SLURM_SUBMIT_DIR": "/jobs", **JOB, **variables}
    command = [str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


def examples() -> list[list[str]]:
    """Arguments of `distbench` in each example of the script's header."""
    words = [shlex.split(line.removeprefix("#")) for line in SCRIPT.read_text().splitlines() if " sbatch " in line]
    return [found[found.index("launch/slurm.sbatch") + 1 :] for found in words if "launch/slurm.sbatch" in found]


def test_slurm_script_header_contains_examples() -> None:
    assert [] in examples()
    assert ["suite", "smoke", "--select", "!name~gaussian"] in examples()


@pytest.mark.parametrize("arguments", examples())
def test_every_example_of_the_slurm_script_selects_cases(tmp_path: Path, arguments: list[str]) -> None:
    options = _parser().parse_args([*launch(tmp_path, *arguments), "--node-rank", "0"])
    assert (options.nnodes, options.nproc, options.rdzv_endpoint) == (2, 8, "n1:20017")
    if options.suite in builtin_suites():
        suite = load_suite(options.suite, options.nnodes * options.nproc, case_flags(options))
        chosen = select(suite.entries, options.select)
        assert 0 < len(chosen) <= len(suite.entries)
        assert (len(chosen) < len(suite.entries)) == bool(options.select)


@pytest.mark.parametrize(
    ("gpus", "arguments", "device"),
    [("8", [], "cuda"), ("8", ["run", "--device", "auto"], "auto"), ("0", [], None), ("", [], None)],
)
def test_slurm_script_requires_devices_for_ranks_with_gpus(
    tmp_path: Path, gpus: str, arguments: list[str], device: str | None
) -> None:
    given = {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
    options = _parser().parse_args(launch(tmp_path, *arguments, **given))
    assert options.case_device == device


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_slurm_script_starts_one_task_per_node_for_any_sbatch_options(tmp_path: Path, nodes: str) -> None:
    several = {"SLURM_NTASKS_PER_NODE": "8", "SLURM_NTASKS": "16"}
    lines = printed(tmp_path, SLURM_JOB_NUM_NODES=nodes, **several)
    assert {f"--nodes={nodes}", f"--ntasks={nodes}", "--ntasks-per-node=1"} <= set(lines)


def test_slurm_script_on_one_node_passes_no_rendezvous(tmp_path: Path) -> None:
    told = launch(tmp_path, "run", "--model", "tiny", SLURM_JOB_NUM_NODES="1", NPROC_PER_NODE="2", OUT="/out")
    assert told == ["run", "--model", "tiny", "--nproc", "2", "--out", "/out"]


def test_slurm_script_on_several_nodes_generates_a_secret(tmp_path: Path) -> None:
    lines = [printed(tmp_path) for _ in range(2)]
    made = {found[1] for found in lines}
    assert len(made) == 2
    assert all(re.fullmatch("[0-9a-f]{64}", secret) for secret in made)
    assert not any(secret in word for secret in made for found in lines for word in found if word != secret)
    variables = {"DISTBENCH_SECRET": "given to the job"}
    given = printed(tmp_path, **variables)
    assert given[1] == "given to the job"
    alone = printed(tmp_path, SLURM_JOB_NUM_NODES="1")
    assert alone[1] == ""


@pytest.mark.parametrize(
    ("out", "folder"),
    [("", "/jobs/distbench-17"), ("results", "/jobs/results"), ("/scratch/results", "/scratch/results")],
)
def test_slurm_script_mounts_the_results_folder_into_a_container(tmp_path: Path, out: str, folder: str) -> None:
    image = {"CONTAINER_IMAGE": "/images/distbench.sqsh", "CONTAINER_MOUNTS": "/data:/data"}
    given = {"OUT": out} if out else {}
    lines = printed(tmp_path, **image, **given)
    outside = folder.startswith("/scratch")
    assert lines[lines.index("--out") + 1] == folder
    mounts = "/data:/data,/jobs:/jobs" + f",{folder}:{folder}" * outside
    assert f"--container-mounts={mounts}" in lines
    made = [number for number, line in enumerate(lines) if line == "mkdir"]
    assert [lines[number + 1 : number + 3] for number in made] == [["-p", folder]] * outside


@pytest.mark.parametrize(
    ("variables", "endpoint"),
    [
        ({"MASTER_ADDR": "stale"}, "n1:20017"),
        ({"ENDPOINT_HOST": "10.0.0.1", "MASTER_PORT": "4000"}, "10.0.0.1:4000"),
        ({"ENDPOINT_HOST": "fd00::1"}, "[fd00::1]:20017"),
        ({"ENDPOINT_HOST": "[fd00::1]"}, "[fd00::1]:20017"),
    ],
)
def test_slurm_script_takes_the_rendezvous_address_from_the_job(
    tmp_path: Path, variables: dict[str, str], endpoint: str
) -> None:
    told = launch(tmp_path, **variables)
    assert told[told.index("--rdzv-endpoint") + 1] == endpoint
