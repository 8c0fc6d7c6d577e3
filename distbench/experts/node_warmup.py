"""One rank of a node fills a cache on disk while the others wait: compiling the same thing eight times helps nobody."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import filelock

from distbench.waits import waiting

_POLL_S = 0.1


def first_on_node(folder: Path, name: str, build: Callable[[], object]) -> bool:
    """Run `build` unless it has run for `name`; whether it did. `folder` is the cache's own, on a disk of this node.

    Who comes while it runs waits for its end. A builder that fails or dies leaves nothing behind, and the next one
    builds. A cache that is deleted takes the notes of what was built with it.
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
