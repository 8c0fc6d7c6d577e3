"""Mutual exclusion of processes: one bench at a time in a folder, and on a set of accelerators of a node.

The locks are the kernel's own (flock): the kernel releases the lock of a dead process at once. A lock file stays, and
names the holder. Lock files of accelerators lie in one folder for all users of a node.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec

from distbench.errors import Busy, InvalidCase
from distbench.report.progress import Meter

DEVICE_LOCKS = Path("/tmp")  # noqa: S108 - TMPDIR differs between users and jobs, and each has to find the others' locks

_POLL_S = 0.1
_NOTE_BYTES = 4096
_COMMAND_SHOWN = 80
_FOR_ALL = 0o666
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK)


class Holder(msgspec.Struct, frozen=True):
    """Holder of a lock: process, start in seconds since the epoch, command line."""

    pid: int
    since: float
    command: str


@contextlib.contextmanager
def hold(out: Path | None, devices: Sequence[str], timeout_s: float) -> Iterator[None]:
    """Hold the folder `out` and each accelerator of `devices`; the CPU is shared, so it is not named there.

    All benches take accelerators in one order, so that two never deadlock.

    Raises:
        Busy: another process holds one of them, and did not release it within `timeout_s`.
        InvalidCase: another file stands in place of a lock file, or its file system has no locks.

    """
    locks = [] if out is None else [(out / ".lock", f"folder {out}")]
    locks += [(device_lock(device), f"device {device}") for device in sorted(set(devices))]
    with contextlib.ExitStack() as stack:
        for path, what in locks:
            stack.enter_context(_held(path, what, timeout_s))
        yield


def device_lock(device: str) -> Path:
    """File of an accelerator's lock."""
    name = "".join(letter if letter.isalnum() else "-" for letter in device)
    return DEVICE_LOCKS / f"distbench-{name}.lock"


def is_held(path: Path) -> bool:
    """Whether a process holds the lock of this file."""
    descriptor = _open(path)
    try:
        return not _taken(descriptor, path)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _held(path: Path, what: str, timeout_s: float) -> Iterator[None]:
    descriptor = _open(path)
    try:
        if not _taken(descriptor, path):
            _wait(descriptor, path, what, timeout_s)
        _sign(descriptor)
        yield
    finally:
        os.close(descriptor)


def _wait(descriptor: int, path: Path, what: str, timeout_s: float) -> None:
    """Wait for a lock that another process holds.

    Raises:
        Busy: it did not release the lock within `timeout_s`.

    """
    deadline = time.monotonic() + timeout_s
    with Meter(f"waiting {timeout_s:g} s for {what}, in use by {_holder(descriptor)}"):
        while not _taken(descriptor, path):
            if time.monotonic() >= deadline:
                message = (
                    f"{what} is in use by {_holder(descriptor)}; wait for it, raise --lock-timeout, or use another"
                )
                raise Busy(message)
            time.sleep(_POLL_S)


def _open(path: Path) -> int:
    """Open a lock file, created for all users if missing; never follow a link placed there.

    Linux forbids creating a file in /tmp that exists and belongs to another user, but permits opening it.
    """
    flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    try:
        with contextlib.suppress(FileExistsError):
            descriptor = os.open(path, flags | os.O_CREAT | os.O_EXCL, _FOR_ALL)
            os.fchmod(descriptor, _FOR_ALL)
            return descriptor
        descriptor = os.open(path, flags)
    except OSError as error:
        message = f"lock {path}: cannot be opened ({error.strerror}); remove it, or have its owner remove it"
        raise InvalidCase(message) from error
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        message = f"lock {path}: not a plain file with a single link; remove it, or have its owner remove it"
        raise InvalidCase(message)
    return descriptor


def _taken(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        message = (
            f"lock {path}: its file system has no locks ({error.strerror}); name a folder on another one, or mount it "
            "with them (Lustre: -o flock)"
        )
        raise InvalidCase(message) from error
    return True


def _sign(descriptor: int) -> None:
    """Write the holder to the lock file. Best effort: ignored if the disk is full."""
    holder = Holder(os.getpid(), time.time(), " ".join(sys.argv)[:_COMMAND_SHOWN])
    with contextlib.suppress(OSError):
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, msgspec.json.encode(holder), 0)


def _holder(descriptor: int) -> str:
    try:
        holder = msgspec.json.decode(os.pread(descriptor, _NOTE_BYTES, 0), type=Holder)
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    except (ValueError, OverflowError, OSError):
        return "a process that has left no name"
    command = "".join(letter if letter.isprintable() else "?" for letter in holder.command[:_COMMAND_SHOWN])
    return f"process {holder.pid} ({command}) since {since}"
