"""Detection of a launcher that started this process as one of several tasks, each of which would test a node alone."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from distbench.errors import InvalidCase
from distbench.report.terminal import print_note


class _Launcher(NamedTuple):
    """The variables in which a launcher gives the number of tasks, and a process's own number."""

    name: str
    size: str
    rank: str


# The launcher that started the process takes precedence over the scheduler of its job.
_LAUNCHERS = (
    _Launcher("Open MPI", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    _Launcher("MVAPICH", "MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
    _Launcher("jsrun", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_RANK"),
    _Launcher("Flux", "FLUX_JOB_SIZE", "FLUX_TASK_RANK"),
    _Launcher("PMI", "PMI_SIZE", "PMI_RANK"),
    _Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
)
# Variables of a training operator or launch script for torchrun, whose ranks never get here. Node ranges are ignored.
_FOR_TORCHRUN = (
    _Launcher("a training operator", "WORLD_SIZE", "RANK"),
    _Launcher("for torchrun", "PET_NNODES", "PET_NODE_RANK"),
    _Launcher("for torchrun", "NNODES", "NODE_RANK"),
)
_MOST_DIGITS = 9
_COMPLETION_INDEX = "JOB_COMPLETION_INDEX"
_FIX = (
    "distbench starts the ranks of a node itself: start it once a node with --nnodes N --node-rank R --rdzv-endpoint "
    "HOST:PORT (docs/cluster.md), or with --nnodes 1 to test each node alone"
)


def refuse_tasks(environ: Mapping[str, str] = os.environ) -> None:
    """Refuse to be one of several tasks, or alone in a job of several nodes: a PASS would count for the cluster.

    Raises:
        InvalidCase: names the task and the number of tasks, and the fix.

    """
    found = _task(environ)
    if found:
        message = f"started as {found}; {_FIX}"
        raise InvalidCase(message)


def tell_task(environ: Mapping[str, str] = os.environ) -> None:
    """Print a note where this is one of several tasks: the command tests one node, and its table has that node alone.

    Ranks of torchrun are no such tasks: they test together.
    """
    found = "" if "TORCHELASTIC_RUN_ID" in environ else _task(environ)
    if found:
        print_note(f"started as {found}: each task tests its own node alone")


def _task(environ: Mapping[str, str]) -> str:
    """The task among several, in words; empty for the only one."""
    for launcher in _LAUNCHERS:
        size, rank = _number(environ, launcher.size), _number(environ, launcher.rank)
        if size is not None and rank is not None:
            return _told(launcher, rank, size)
    tasks, rank = _number(environ, "SLURM_NTASKS"), _number(environ, "SLURM_PROCID")
    in_script = "SLURM_JOB_ID" in environ and rank == 0  # a batch script runs once, whatever it requests
    if tasks is not None and rank is not None and not in_script:
        return _told(_Launcher("Slurm", "SLURM_NTASKS", "SLURM_PROCID"), rank, tasks)
    if environ.get(_COMPLETION_INDEX):
        return f"task {environ[_COMPLETION_INDEX]:.20} of an Indexed Job ({_COMPLETION_INDEX})"
    for launcher in _FOR_TORCHRUN:
        size, rank = _number(environ, launcher.size), _number(environ, launcher.rank)
        if size is not None and rank is not None and size > 1:
            return _told(launcher, rank, size)
    return next(
        (f"the only task in a job of {count} nodes ({name})" for name, count in _nodes(environ) if count > 1), ""
    )


def _told(launcher: _Launcher, rank: int, size: int) -> str:
    return f"task {rank} of {size} ({launcher.name}: {launcher.rank}, {launcher.size})" if size > 1 else ""


def _nodes(environ: Mapping[str, str]) -> list[tuple[str, int]]:
    """Nodes of a batch job, by the scheduler's variables."""
    hosts = environ.get("LSB_MCPU_HOSTS", "").split()  # pairs of host and slots
    return [
        ("SLURM_JOB_NUM_NODES", _number(environ, "SLURM_JOB_NUM_NODES") or 0),
        ("NHOSTS", _number(environ, "NHOSTS") or 0),
        ("PBS_NODEFILE", len(set(_lines(environ.get("PBS_NODEFILE", ""))))),
        ("LSB_MCPU_HOSTS", len(set(hosts[::2]))),
    ]


def _lines(path: str) -> list[str]:
    try:
        return Path(path).read_text(encoding="utf-8").split() if path else []
    except (OSError, ValueError):
        return []


def _number(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    return int(text) if text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS else None
