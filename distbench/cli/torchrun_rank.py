"""A command as one of the ranks that torchrun started."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from distbench.errors import InvalidCase, LaunchFailed, Unsupported
from distbench.utils.text import one_line
from distbench.utils.variables import whole

if TYPE_CHECKING:
    from distbench.launcher.job import Job

_NUMBERS = {"RANK": 0, "LOCAL_RANK": 0, "GROUP_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1, "GROUP_WORLD_SIZE": 1}
"""Variables that torchrun sets for each rank, with their least values."""
_FIX = "torchrun sets it for each rank: start the ranks by torchrun, or unset TORCHELASTIC_RUN_ID to start them here"


def world_size() -> int | None:
    """Number of ranks, where torchrun started this process as one of them; else None.

    Raises:
        InvalidCase: one of torchrun's numbers is missing, or is none.

    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    return {name: whole(name, os.environ.get(name, ""), least, _FIX) for name, least in _NUMBERS.items()}["WORLD_SIZE"]


def is_rank_0() -> bool:
    """Whether this process is rank 0 of those that torchrun started."""
    return os.environ.get("RANK") == "0"


def alone(command: str) -> None:
    """Refuse to be started by torchrun: this process makes many launches of its own.

    Raises:
        InvalidCase: torchrun started this process.

    """
    if world_size() is not None:
        message = f"{command} starts its ranks itself; run it without torchrun"
        raise InvalidCase(message)


@contextlib.contextmanager
def hold_as_rank(job: Job, timeout_s: float) -> Iterator[None]:
    """Hold the locks of a bench that starts its own ranks: the folder by rank 0, a node's devices by its first rank.

    No rank proceeds before all locks are held and files of an earlier launch are deleted. On one node gloo and NCCL are
    restricted to loopback.

    Raises:
        Busy: another bench holds one of them.
        InvalidCase: gloo is configured to use a missing interface.
        LaunchFailed: a rank that should hold a lock did not join.

    """
    from distbench.launcher.job import clear_ranks
    from distbench.launcher.locks import hold
    from distbench.launcher.nodes.interfaces import check_interfaces, choose_loopback

    first = os.environ.get("LOCAL_RANK") == "0"
    check_interfaces(accelerated=False)
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        choose_loopback()
    with hold(Path(job.out) if is_rank_0() else None, _devices(job) if first else (), timeout_s):
        if is_rank_0():
            clear_ranks(Path(job.out))
        with _all_held(timeout_s + job.longest_stage_s, holds=first):
            yield


@contextlib.contextmanager
def _all_held(timeout_s: float, *, holds: bool) -> Iterator[None]:
    """Wait for the first rank of every node; within the context the store stays open, which rank 0 may host."""
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    timeout = timedelta(seconds=timeout_s)
    held = [f"distbench/held-{node}" for node in range(int(os.environ["GROUP_WORLD_SIZE"]))]
    try:
        store, _, _ = next(rendezvous("env://", timeout=timeout))
        if holds:
            store.set(held[int(os.environ["GROUP_RANK"])], "")
        store.wait(held, timeout)
    except dist.DistError as error:
        message = (
            f"the first rank of each node did not come within {timeout_s:g} s, --lock-timeout and the longest stage "
            f"({one_line(error)}); see what it says, or raise one of them"
        )
        raise LaunchFailed(message) from error
    yield


def _devices(job: Job) -> tuple[str, ...]:
    """Devices that the ranks of this node take; where there are too few, the cases end with that error."""
    from distbench.launcher.preflight import check_devices

    cases = [entry.case for entry in job.entries if not entry.refused]
    try:
        return check_devices(cases, int(os.environ["LOCAL_WORLD_SIZE"])) if cases else ()
    except Unsupported:
        return ()


def work(job: Job) -> int:
    """Run the job as one of the ranks that torchrun started; return the exit code."""
    from distbench.launcher.worker import work

    return work(job)
