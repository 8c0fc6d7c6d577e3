"""Resources of a launch besides memory: disk, shared memory, open files. Estimates, measured on EP1 to EP16."""

from __future__ import annotations

import os
import resource
import tempfile
from collections.abc import Iterable
from pathlib import Path

from distbench.case.spec import Case
from distbench.errors import DiskFull, LaunchFailed, Unsupported, is_disk_full

_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - looked at, nothing is written there
_PAGE_BYTES = 4096

_LITTLE_BYTES = 64 << 10

# A report: its frame, each rank's record, the rows sent, raw times of timed iterations per
# rank and in all, and of repeats.
_FRAME_BYTES, _RANK_BYTES = 8 << 10, 2 << 10
_SENT_BYTES, _MOST_SENT_BYTES = 6, 64 << 10
_RANK_SAMPLE_BYTES, _RANK_SAMPLES = 18, 512
_ITERATION_BYTES = 90
_REPEAT_BYTES, _REPEATS = 120, 1000

# torchrun's agent and its ranks use semaphores of a page each.
_AGENT_PAGES, _RANK_PAGES = 16, 4
# NCCL's bytes for one direction between two devices without peer access, and the number of directions.
_NCCL_BYTES, _NCCL_CHANNELS = 9_637_888, 2

# The supervisor's files: node 0's also hold the store to which all ranks connect, and a connection to each other node.
# And those of a rank: a socket to each other rank, and for ranks of its node queues, another socket, a file, which is
# open twice where it is mapped, and three events.
_AGENT_FILES, _FILES_FOR_RANK, _FILES_FOR_FAR_RANK = 32, 7, 2
_RANK_FILES = 24
_MOST_LOCAL_RANKS = 124


def report_bytes(cases: Iterable[Case]) -> int:
    """Estimated bytes of the reports of these cases on disk."""
    return sum(_one_report(case) for case in cases)


def _one_report(case: Case) -> int:
    rank = _RANK_BYTES + _RANK_SAMPLE_BYTES * min(case.iterations, _RANK_SAMPLES)
    samples = _ITERATION_BYTES * case.iterations + _REPEAT_BYTES * min(case.repeats, _REPEATS)
    sent = min(_SENT_BYTES * case.ep_size**2, _MOST_SENT_BYTES)
    return _FRAME_BYTES + case.ep_size * rank + samples + sent


def prove_room(out: Path, case: Case) -> None:
    """Prove that `out` has room for another report of `case`: a dead rank may have lacked room for its failure file.

    Raises:
        DiskFull: it has none.

    """
    try:
        with tempfile.TemporaryFile(dir=out) as probe:
            probe.write(bytes(_LITTLE_BYTES + _one_report(case)))
    except OSError as error:
        if not is_disk_full(error):
            raise
        message = f"{out}: {error.strerror}"
        raise DiskFull(message) from error


def allow_open_files(local_ranks: int, ranks: int, limits: tuple[int, int] | None = None) -> None:
    """Let this process and the ranks that it starts open as many files as a launch of `ranks` needs.

    `limits` are the soft and the hard limit, for tests; None queries the system, and raises its soft limit where
    needed.

    Raises:
        LaunchFailed: names the files needed and those that the hard limit allows.
        Unsupported: more ranks than one process can start.

    """
    if local_ranks > _MOST_LOCAL_RANKS:
        message = (
            f"{local_ranks} ranks on this node: one process starts at most {_MOST_LOCAL_RANKS}, since each is handed "
            "two descriptors of every rank at once, and the system hands over 253; start several with --nnodes"
        )
        raise Unsupported(message)
    elsewhere = ranks - local_ranks
    agent = _AGENT_FILES + _FILES_FOR_RANK * local_ranks + _FILES_FOR_FAR_RANK * elsewhere
    needed = max(agent, _RANK_FILES + 8 * local_ranks + ranks)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE) if limits is None else limits
    if _allows(soft, needed):
        return
    if not _allows(hard, needed):
        message = f"open files: {local_ranks} ranks here take about {needed}, {hard} are allowed; ulimit -Hn {needed}"
        raise LaunchFailed(message)
    if limits is None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


def _allows(limit: int, needed: int) -> bool:
    return limit == resource.RLIM_INFINITY or limit >= needed


def check_shared_memory(local_ranks: int, *, on_devices: bool, free: int | None = None) -> tuple[str, ...]:
    """Refuse a launch for which /dev/shm has no room; return a warning where NCCL may find too little of it.

    The emulated heap of mori and gloo use none. NCCL uses some only where devices have no peer access, which cannot be
    queried before ranks start. `free` is in bytes; None queries the system, where there is a /dev/shm.

    Raises:
        Unsupported: names the bytes needed and free, and the fix.

    """
    found = _free_bytes() if free is None else free
    needed = (_AGENT_PAGES + _RANK_PAGES * local_ranks) * _PAGE_BYTES
    if found is None:
        return ()
    if found < needed:
        message = (
            f"shared memory: {local_ranks} ranks meet at semaphores, about {needed} bytes of {_SHARED_MEMORY}; "
            f"{found} are free: remove what is left there, or make it larger (docker run --shm-size, or --ipc host)"
        )
        raise Unsupported(message)
    most = needed + local_ranks * (local_ranks - 1) * _NCCL_CHANNELS * _NCCL_BYTES if on_devices else 0
    if found >= most:
        return ()
    warning = (
        f"shared memory: {found} bytes of {_SHARED_MEMORY} are free, NCCL takes up to about {most} for {local_ranks} "
        "ranks where devices do not reach each other's memory; should it fail, docker run --shm-size, or --ipc host"
    )
    return (warning,)


def _free_bytes() -> int | None:
    try:
        found = os.statvfs(_SHARED_MEMORY)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize
