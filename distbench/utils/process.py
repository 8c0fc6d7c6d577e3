"""Process facts from the kernel, and controls over processes."""

from __future__ import annotations

import ctypes
import hashlib
import os
import resource
import signal
import socket
import sys
from functools import lru_cache
from pathlib import Path

STOPPED = "T"
GONE = "gone"
_ZOMBIE = "Z"
_STAT_BYTES = 1 << 12
_PR_SET_PDEATHSIG = 1
_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def usable_cores(quota: Path = _QUOTA) -> int:
    """Cores that this process may keep busy: those of its affinity, capped by its control group's quota.

    More threads than that would spin while they wait for each other.
    """
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        microseconds, period = quota.read_text().split()
        return min(allowed, max(-(-int(microseconds) // int(period)), 1))
    except (OSError, ValueError):  # no such group, or "max"
        return allowed


def peak_bytes() -> int:
    """Largest resident size of this process so far, in bytes."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size if sys.platform == "darwin" else size * 1024


def state(pid: int) -> str:
    """Linux's state of the process (R, S, D, T, Z, …), or GONE."""
    try:
        descriptor = os.open(f"/proc/{pid}/stat", os.O_RDONLY | os.O_CLOEXEC)  # a quarter of Path.read_text's time
    except OSError:
        return GONE
    try:
        return os.read(descriptor, _STAT_BYTES).rpartition(b")")[2].split()[0].decode()
    except OSError:
        return GONE
    finally:
        os.close(descriptor)


def is_alive(pid: int) -> bool:
    """Whether the process exists and is no zombie."""
    return state(pid) not in (GONE, _ZOMBIE)


@lru_cache(maxsize=1)
def pid_space() -> int:
    """Identifier of a pid space, from boot and namespace: equal ones give process ids the same meaning."""
    parts = [socket.gethostname()]
    try:
        parts += [Path("/proc/sys/kernel/random/boot_id").read_text(), str(Path("/proc/self/ns/pid").readlink())]
    except OSError:
        parts.append(sys.platform)
    digest = hashlib.blake2b("\n".join(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def die_with_parent() -> None:
    """Make Linux kill this process when its parent ends, for any reason."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
