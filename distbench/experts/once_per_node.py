"""One rank of a node fills an on-disk cache while the others wait, so that kernels are compiled once per node."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import filelock

from distbench.distributed.waits import waiting

_POLL_S = 0.1


def first_on_node(folder: Path, name: str, build: Callable[[], object]) -> bool:
    """Run `build` once for `name` and return whether this call ran it. `folder` is the cache's own, on a local disk.

    Concurrent callers wait for the builder. A builder that fails or dies leaves no note, and the next caller builds. A
    deleted cache takes its notes with it.
    """
    note = folder / f"distbench-{hashlib.sha256(name.encode()).hexdigest()[:16]}.built"
    if note.exists():
        return False
    lock = filelock.FileLock(note.with_suffix(".lock"), poll_interval=_POLL_S)
    with waiting("lock of this node's compilation"):
        held = lock.acquire()
    with held:
        if note.exists():
            return False
        build()
        note.write_text(f"{name}\n")
    return True
