"""Launchers that start one process per task: refused, since each would report a PASS of its own."""

from __future__ import annotations

import importlib
from pathlib import Path
from unittest.mock import Mock

import pytest

from distbench.cli import launching
from distbench.cli.launcher_tasks import refuse_tasks, tell_task
from distbench.cli.main import main
from distbench.errors import InvalidCase
from distbench.report.bundle import read

BATCH = {"SLURM_JOB_ID": "17", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"}


@pytest.mark.parametrize(
    ("environ", "told"),
    [
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}, "task 1 of 2"),
        ({"SLURM_NTASKS": "2", "SLURM_PROCID": "0"}, "task 0 of 2"),
        (BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"}, "task 1 of 2"),
        (BATCH | {"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, "task 0 of 2"),
        (BATCH | {"SLURM_JOB_NUM_NODES": "4"}, "the only task in a job of 4 nodes"),
        ({"OMPI_COMM_WORLD_SIZE": "16", "OMPI_COMM_WORLD_RANK": "3"}, "task 3 of 16"),
        ({"PMI_SIZE": "2", "PMI_RANK": "1"}, "task 1 of 2"),
        ({"MV2_COMM_WORLD_SIZE": "2", "MV2_COMM_WORLD_RANK": "1"}, "task 1 of 2"),
        ({"JSM_NAMESPACE_SIZE": "2", "JSM_NAMESPACE_RANK": "0"}, "task 0 of 2"),
        ({"FLUX_JOB_SIZE": "2", "FLUX_TASK_RANK": "0"}, "task 0 of 2"),
        ({"WORLD_SIZE": "4", "RANK": "2"}, "task 2 of 4"),
        ({"WORLD_SIZE": "1", "RANK": "0", "PET_NNODES": "2", "PET_NODE_RANK": "1"}, "task 1 of 2"),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "node0"}, "task 0 of 2"),
        ({"JOB_COMPLETION_INDEX": "3"}, "task 3 of an Indexed Job"),
        ({"NHOSTS": "2"}, "the only task in a job of 2 nodes"),
        ({"LSB_MCPU_HOSTS": "a 8 b 8"}, "the only task in a job of 2 nodes"),
    ],
)
def test_one_of_several_launcher_tasks_is_refused_with_the_options_to_give(environ: dict[str, str], told: str) -> None:
    with pytest.raises(InvalidCase, match=f"started as {told}.*--nnodes N --node-rank R.*--nnodes 1"):
        refuse_tasks(environ)


@pytest.mark.parametrize(
    "environ",
    [
        {},
        BATCH | {"SLURM_JOB_NUM_NODES": "1"},  # a batch script runs once for any number of tasks
        {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8"},  # salloc
        BATCH | {"SLURM_JOB_NUM_NODES": "2", "SLURM_STEP_ID": "3", "SLURM_STEP_NUM_TASKS": "1"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"},
        {"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1"},
        {"WORLD_SIZE": "1", "RANK": "0"},
        {"WORLD_SIZE": "4"},
        {"NNODES": "1", "NODE_RANK": "0"},
        {"NNODES": "2"},
        {"PET_NNODES": "1:4", "PET_NODE_RANK": "0"},
        {"PMI_SIZE": "two", "PMI_RANK": "1"},
        {"PBS_NODEFILE": "/nowhere"},
        {"LSB_MCPU_HOSTS": "a 16"},
    ],
)
def test_single_launcher_task_of_a_node_is_accepted(environ: dict[str, str]) -> None:
    refuse_tasks(environ)


def test_pbs_script_on_several_nodes_is_refused(tmp_path: Path) -> None:
    nodes = tmp_path / "nodes"
    nodes.write_text("a\na\n")
    refuse_tasks({"PBS_NODEFILE": str(nodes)})
    nodes.write_text("a\na\nb\nb\n")
    with pytest.raises(InvalidCase, match="a job of 2 nodes"):
        refuse_tasks({"PBS_NODEFILE": str(nodes)})


@pytest.mark.parametrize("command", [["run", "--model", "tiny"], ["suite", "smoke"]])
def test_command_started_as_a_task_runs_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    for name, value in {"SLURM_NTASKS": "2", "SLURM_PROCID": "1"}.items():
        monkeypatch.setenv(name, value)
    assert main([*command, "--nproc", "1", "--out", str(tmp_path / "out")]) == 2
    assert "INVALID: started as task 1 of 2" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    one_node = ["--nnodes", "1", "--node-rank", "1"]
    assert main([*command, "--nproc", "1", "--out", str(tmp_path / "out"), *one_node]) == 2
    assert "node ranks go from 0" in capsys.readouterr().err


SINGLE_NODE = {
    "sweep": ["--model", "tiny", "--nproc", "1"],
    "selftest": ["--nproc", "2"],
    "mutants": ["--nproc", "2"],
    "bisect": ["case.toml"],
    "shrink": ["case.toml"],
    "replay": ["bundle"],
    "tune": [],
}


@pytest.mark.parametrize("command", SINGLE_NODE)
def test_single_node_command_started_as_a_launcher_task_prints_a_note(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    def stop(*_: object, **__: object) -> None:
        message = "stopped by the test"
        raise InvalidCase(message)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLURM_NTASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    module = importlib.import_module(f"distbench.cli.{command}")
    monkeypatch.setattr(launching, "check_launch", stop)  # what comes next
    for name in ("one_case", "_shape"):
        monkeypatch.setattr(module, name, stop, raising=False)
    monkeypatch.setattr(read, "runnable_case", stop)
    monkeypatch.setattr(read, "open_bundle", Mock())
    monkeypatch.setattr(module, "_analyse", Mock(), raising=False)
    assert main([command, *SINGLE_NODE[command]]) == 2
    told = capsys.readouterr().err
    assert told.count("started as task 1 of 2") == 1
    assert ": each task tests its own node alone" in told
    assert "stopped by the test" in told


def test_ranks_of_torchrun_are_no_tasks_to_tell_of(capsys: pytest.CaptureFixture[str]) -> None:
    tell_task({"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "RANK": "1"})
    tell_task({})
    assert not capsys.readouterr().err
