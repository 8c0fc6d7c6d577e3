"""Where several processes meet: one bench at a time in a folder, and one on a set of accelerators of a node.

The locks are the kernel's own (flock, through filelock): that of a process which died is free at once.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import filelock
import msgspec

from distbench.errors import Busy

_POLL_S = 0.1


class Holder(msgspec.Struct, frozen=True):
    """Who holds a lock: process, start in seconds since the epoch, command line."""

    pid: int
    since: float
    command: str


@contextmanager
def hold(out: Path, devices: Sequence[str], timeout_s: float) -> Iterator[None]:
    """Hold the folder `out` and each accelerator of `devices`; the CPU is nobody's alone, so it is not named there.

    Accelerators are taken in one order by all, so that two benches never wait for each other.

    Raises:
        Busy: another process holds one of them, and did not let go within `timeout_s`.

    """
    locks = [(out / ".lock", f"folder {out}")]
    locks += [(_device_lock(device), f"device {device}") for device in sorted(set(devices))]
    with ExitStack() as stack:
        for path, what in locks:
            stack.enter_context(_held(path, what, timeout_s))
        yield


@contextmanager
def _held(path: Path, what: str, timeout_s: float) -> Iterator[None]:
    lock = filelock.FileLock(path, timeout=timeout_s, poll_interval=_POLL_S)
    note = path.with_suffix(".holder.json")
    try:
        lock.acquire()
    except filelock.Timeout as error:
        message = f"{what} is in use by {_describe(note)}; wait for it, raise --lock-timeout, or use another one"
        raise Busy(message) from error
    try:
        note.write_bytes(msgspec.json.encode(Holder(os.getpid(), time.time(), " ".join(sys.argv))))
        yield
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _device_lock(device: str) -> Path:
    name = "".join(letter if letter.isalnum() else "-" for letter in device)
    return Path(tempfile.gettempdir()) / f"distbench-{os.getuid()}-{name}.lock"


def _describe(note: Path) -> str:
    try:
        holder = msgspec.json.decode(note.read_bytes(), type=Holder)
    except (OSError, msgspec.DecodeError):
        return "a process that has not said who it is"
    since = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(holder.since))
    return f"process {holder.pid} ({holder.command[:80]}) since {since}"
