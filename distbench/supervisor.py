"""The process that starts the ranks: torchrun's own agent, over ranks forked from one interpreter that has torch.

torchrun starts every rank as a new interpreter, and each imports torch for itself. Here the agent's start method is
`forkserver`: one process imports torch once, and the ranks are forked from it.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
from multiprocessing import forkserver
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from distbench.breadcrumbs import read_position
from distbench.job import Job, RankFailure, crumb_path, describe_failure, failure_path

if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

_MONITOR_SECONDS = 0.1


def preload_ranks() -> None:
    """Begin to import torch in the process that ranks are forked from, while this one goes on."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.set_forkserver_preload(["distbench.worker"])
    forkserver.ensure_running()


class LaunchFailed(Exception):
    """The ranks ended without an outcome; the message names the first that failed."""


def launch(job: Job) -> None:
    """Run `job` on `case.ep_size` ranks of this machine, until all have ended.

    Raises:
        LaunchFailed: a rank raised, or was killed.

    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError  # noqa: PLC0415
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

    logging.getLogger("torch").setLevel(logging.CRITICAL)
    failure_path(Path(job.out)).unlink(missing_ok=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=job.case.ep_size,
        run_id=f"distbench-{os.getpid()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        start_method="forkserver",
        monitor_interval=_MONITOR_SECONDS,
        max_restarts=0,
    )
    try:
        elastic_launch(config, start_rank)(job)
    except ChildFailedError as error:
        raise LaunchFailed(_explain(job, error)) from error


def start_rank(job: Job) -> int:
    """Enter a rank's process; everything heavy is loaded there, not in the process that watches."""
    from distbench.worker import work  # noqa: PLC0415

    return work(job)


def _explain(job: Job, error: ChildFailedError) -> str:
    path = failure_path(Path(job.out))
    if path.exists():
        return describe_failure(msgspec.json.decode(path.read_bytes(), type=RankFailure))
    rank, failure = error.get_first_failure()
    position = read_position(crumb_path(Path(job.out), rank))
    place = "before its first stage" if position is None else f"in {position.arm or 'setup'}, {position.stage}"
    return f"rank {rank} ended with {failure.signal_name() if failure.exitcode < 0 else failure.exitcode} {place}"
