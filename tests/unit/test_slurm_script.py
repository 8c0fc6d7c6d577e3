"""What launch/slurm.sbatch tells `distbench`, by an srun that prints its arguments; and the examples that it gives."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from distbench.cli import _parser
from distbench.commands.options import case_flags
from distbench.suite import load_suite, select
from distbench.suite_files import builtin_suites
from tests.hosts import ROOT

SCRIPT = ROOT / "launch" / "slurm.sbatch"
JOB = {"SLURM_JOB_ID": "17", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NODELIST": "n[1-2]"}


def launch(folder: Path, *arguments: str, **variables: str) -> list[str]:
    """Return the arguments of `distbench` on the job's nodes."""
    for name, text in (("srun", 'printf "%s\\n" "$@"'), ("scontrol", "echo n1"), ("distbench", ":")):
        path = folder / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)
    environment = {"PATH": os.defpath, "VENV": str(folder), "SLURM_SUBMIT_DIR": "/jobs", **JOB, **variables}
    command = [str(SCRIPT), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    return lines[lines.index("task") + 2 :]


def examples() -> list[list[str]]:
    """Return the arguments for `distbench` in each line of the script's head that submits it."""
    words = [shlex.split(line.removeprefix("#")) for line in SCRIPT.read_text().splitlines() if " sbatch " in line]
    return [found[found.index("launch/slurm.sbatch") + 1 :] for found in words if "launch/slurm.sbatch" in found]


def test_the_head_has_examples() -> None:
    assert [] in examples()
    assert ["suite", "smoke", "--select", "!name~gaussian"] in examples()


@pytest.mark.parametrize("arguments", examples())
def test_an_example_is_a_command_that_selects_cases(tmp_path: Path, arguments: list[str]) -> None:
    options = _parser().parse_args([*launch(tmp_path, *arguments), "--node-rank", "0"])
    assert (options.nnodes, options.nproc, options.rdzv_endpoint) == (2, 8, "n1:20017")
    if options.suite in builtin_suites():
        suite = load_suite(options.suite, options.nnodes * options.nproc, case_flags(options), [])
        chosen = select(suite.entries, options.select)
        assert 0 < len(chosen) <= len(suite.entries)
        assert (len(chosen) < len(suite.entries)) == bool(options.select)


@pytest.mark.parametrize(
    ("gpus", "arguments", "device"),
    [("8", [], "cuda"), ("8", ["run", "--device", "auto"], "auto"), ("0", [], None), ("", [], None)],
)
def test_ranks_that_got_gpus_have_to_run_on_them(
    tmp_path: Path, gpus: str, arguments: list[str], device: str | None
) -> None:
    given = {"SLURM_GPUS_ON_NODE": gpus} if gpus else {}
    options = _parser().parse_args(launch(tmp_path, *arguments, **given))
    assert options.case_device == device


def test_one_node_needs_no_rendezvous(tmp_path: Path) -> None:
    told = launch(tmp_path, "run", "--model", "tiny", SLURM_JOB_NUM_NODES="1", NPROC_PER_NODE="2", OUT="/out")
    assert told == ["run", "--model", "tiny", "--nproc", "2", "--out", "/out"]
