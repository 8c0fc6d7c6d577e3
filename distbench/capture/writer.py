"""The thread that writes a capture: it waits for copies, keeps the steps to record, and counts what was left out."""

from __future__ import annotations

import atexit
import contextlib
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any, NamedTuple

import torch

from distbench.capture.hidden_buffers import Room
from distbench.capture.host_buffers import Buffers
from distbench.capture.part_file import (
    Seen,
    counts_bytes,
    counts_name,
    part_bytes,
    part_name,
    prepare_folder,
    write_private,
)
from distbench.capture.recent_tensors import RecentTensors
from distbench.capture.settings import Place, Settings, tell

_PART_BYTES = 4 << 20
_PART_SECONDS = 30.0
_LOOK_SECONDS = 0.5
_RECENT_BYTES = 64 << 20
_MOST_MARKS = 64
_CLOSE_SECONDS = 10.0
_MARK = re.compile(r"violated-(\d{1,15})", re.ASCII)


class Taken(NamedTuple):
    """A dispatch of `tokens` tokens in buffers, whole once `done` is reached; None where it is already.

    `hidden` has its hidden states, where they are kept.
    """

    step: int
    layer: int
    tokens: int
    buffers: Buffers
    limit: int
    done: Any
    hidden: Room | None = None


class Files(NamedTuple):
    """What a writer writes: the capture's settings, rank and layer, the program, and the device of the copies."""

    settings: Settings
    place: Place
    source: str
    device: torch.device


@dataclass
class Missed:
    """Dispatches that never reached the writer."""

    in_graphs: int = 0
    behind: int = 0
    tensors_unlike: int = 0
    tensors_behind: int = 0


class Writer:
    """Files of one rank. Its thread ends with the process, or by `close`."""

    def __init__(self, files: Files, free: deque[Buffers], missed: Missed, failed: Callable[[str], None]) -> None:
        """Put the buffers of dispatches that were taken in back into `free`.

        `failed` is called in the thread with the reason of an error that ends it.

        Raises:
            OSError: the folder cannot be made.
            ValueError: it is no folder, is open to others, or has another capture of the rank.

        """
        settings, place, self._source, self._device = files
        self._settings, self._place, self._free, self._missed, self._failed = settings, place, free, missed, failed
        self._folder = Path(settings.folder)
        self._tensors = RecentTensors(self._folder, place, settings.most_tensor_bytes)
        self.rooms: deque[Room] = deque()
        self._queue: SimpleQueue[Taken | None] = SimpleQueue()
        self._recent: deque[Seen] = deque()
        self._recent_bytes = self._pending_bytes = self._bytes = self._parts = 0
        self._pending: list[Seen] = []
        self._marked: set[int] = set()
        self._written = self._looked = time.monotonic()
        self._reason = ""
        self._recorded = self._over = self._violations = self._too_late = 0
        prepare_folder(self._folder, place.rank, self._counts())
        self._thread = threading.Thread(target=self._run, name="distbench-capture", daemon=True)
        self._thread.start()
        atexit.register(self.close)

    def put(self, taken: Taken) -> None:
        """Hand over a dispatch."""
        self._queue.put(taken)

    def close(self, reason: str = "") -> None:
        """Write what was handed over, and end the thread; `reason`, of an error in a step, stands in the counts.

        It waits for the thread, but not after an error, when a step calls it: the end of the process waits then.
        """
        self._reason = self._reason or reason
        self._queue.put(None)
        if reason or threading.current_thread() is self._thread:
            return
        self._thread.join(_CLOSE_SECONDS)
        atexit.unregister(self.close)

    def _run(self) -> None:
        try:
            if self._device.type != "cpu":
                torch.cuda.set_device(self._device)  # that of the events, not the first one
            while self._some():
                pass
            if self._settings.violations:
                self._look()
            self._keep_recent(0)
            self._write()
        except Exception as error:  # noqa: BLE001 - whatever it is, the server goes on without a capture
            self._failed(f"{type(error).__name__}: {error}")
            with contextlib.suppress(OSError):
                self._write_counts()

    def _some(self) -> bool:
        """Take in what there is, or nothing for a while; False at the end."""
        try:
            taken = self._queue.get(timeout=_LOOK_SECONDS)
            while taken is not None:
                self._take(taken)
                self._on_time()
                taken = self._queue.get_nowait()
        except Empty:
            self._on_time()
        else:
            return False
        return True

    def _on_time(self) -> None:
        """Read the marks, and write a part, where it is time to."""
        now = time.monotonic()
        if self._settings.violations and now - self._looked >= _LOOK_SECONDS:
            self._look()
            self._looked = now
        if self._pending_bytes >= _PART_BYTES or now - self._written >= _PART_SECONDS:
            self._write()
            self._written = now

    def _take(self, taken: Taken) -> None:
        if taken.done is not None:
            taken.done.synchronize()
        ids, weights, total_recv = taken.buffers.arrays
        shares = None if weights is None else weights[: taken.tokens].copy()
        seen = Seen(taken.step, taken.layer, ids[: taken.tokens].copy(), shares, int(total_recv[0]), taken.limit)
        self._free.append(taken.buffers)
        if taken.hidden is not None:
            self._tensors.add((seen.step, seen.layer), taken.tokens, taken.hidden, self.rooms)
        if 0 < seen.limit < seen.total_recv:
            self._violations += 1
            self._mark(seen.step)
            if self._settings.most_tensor_bytes:
                self._tensors.want((seen.step, seen.layer))
        if seen.step % self._settings.every == 0:
            self._keep(seen)
        elif self._settings.violations:
            self._recent.append(seen)
            self._recent_bytes += seen.size
            self._keep_recent(_RECENT_BYTES)

    def _mark(self, step: int) -> None:
        """Tell all ranks, by a file, that the steps next to this one are to be recorded."""
        if not self._settings.violations or step in self._marked:
            return
        self._look()
        if len(self._marked) < _MOST_MARKS:
            self._marked.add(step)
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._folder / f"violated-{step}", os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))

    def _look(self) -> None:
        """Read the marks of all ranks."""
        found = {int(mark[1]) for path in self._folder.iterdir() if (mark := _MARK.fullmatch(path.name))}
        oldest = self._recent[0].step if self._recent else 0
        if self._settings.most_tensor_bytes:
            self._tensors.look()
        self._too_late += sum(step < oldest for step in found - self._marked)
        self._marked |= found

    def _keep_recent(self, most: int) -> None:
        """Let the oldest steps go, but for marked ones, until `most` bytes are left."""
        while self._recent and self._recent_bytes > most:
            seen = self._recent.popleft()
            self._recent_bytes -= seen.size
            if not self._marked.isdisjoint((seen.step - 1, seen.step, seen.step + 1)):
                self._keep(seen)

    def _keep(self, seen: Seen) -> None:
        if self._bytes + self._pending_bytes + seen.size > self._settings.most_bytes:
            if not self._over:
                tell(f"{self._folder} has {self._settings.most_bytes >> 20} MiB of this rank, and gets no more")
            self._over += 1
            return
        self._pending.append(seen)
        self._pending_bytes += seen.size
        self._recorded += 1

    def _write(self) -> None:
        """Write the pending dispatches as a part, and the counts."""
        if self._pending:
            content = part_bytes(self._place, self._settings.every, self._source, self._pending)
            write_private(self._folder / part_name(self._place.rank, self._parts), content)
            self._parts += 1
            self._bytes += len(content)
            self._pending, self._pending_bytes = [], 0
        self._write_counts()

    def _write_counts(self) -> None:
        write_private(self._folder / counts_name(self._place.rank), self._counts())

    def _counts(self) -> bytes:
        counts: dict[str, Any] = {
            "recorded": self._recorded,
            "over_size": self._over,
            "behind": self._missed.behind,
            "in_graphs": self._missed.in_graphs,
            "violations": self._violations,
            "too_late": self._too_late,
            "error": self._reason[:1000],
        }
        if self._settings.most_tensor_bytes:
            counts |= self._tensors.counts
            counts |= {"tensors_unlike": self._missed.tensors_unlike, "tensors_behind": self._missed.tensors_behind}
        return counts_bytes(self._place, counts)
