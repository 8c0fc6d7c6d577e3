"""Hidden states of a rank's last dispatches in memory, and files of those that a violation on any rank asks for."""

from __future__ import annotations

import contextlib
import os
import re
import time
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any, NamedTuple

from distbench.capture.hidden_buffers import Room
from distbench.capture.part_file import tensors_bytes, tensors_name, write_private
from distbench.capture.settings import Place, tell

_MOST_WANTED = 64
_LOOK_SECONDS = 0.02
_WANTED = re.compile(r"wanted-(\d{1,15})\.(\d{1,7})", re.ASCII)

_Slice = tuple[int, int]


class _Kept(NamedTuple):
    """Bits uint16 or uint8 [n, H] of a dispatch's hidden states, scales float32 [n, H / 128] or None, the format."""

    bits: Any
    scales: Any
    kind: str

    @property
    def size(self) -> int:
        return int(self.bits.nbytes) + (0 if self.scales is None else int(self.scales.nbytes))


class RecentTensors:
    """Keeps at most `most` bytes in memory, and writes as many; a slice is a step and a layer."""

    def __init__(self, folder: Path, place: Place, most: int) -> None:
        self._folder, self._place, self._most = folder, place, most
        self._recent: OrderedDict[_Slice, _Kept] = OrderedDict()
        self._wanted: set[_Slice] = set()
        self._written: set[_Slice] = set()
        self._bytes = self._bytes_written = 0
        self._looked = 0.0
        self._said = False

    @property
    def counts(self) -> dict[str, int]:
        """Dispatches whose hidden states were written, and those that were asked for and were not."""
        return {"tensors": len(self._written), "tensors_lost": len(self._wanted - self._written)}

    def add(self, place: _Slice, tokens: int, room: Room, free: deque[Room]) -> None:
        """Take a dispatch out of its room, which goes back into `free`."""
        bits, scales = room.arrays
        bits = bits[:tokens].copy()
        kept = _Kept(bits if room.kind != "bf16" else bits.view("u2"), _part(scales, tokens), room.kind)
        free.append(room)
        self._recent[place] = kept
        self._bytes += kept.size
        now = time.monotonic()
        if now - self._looked >= _LOOK_SECONDS:
            self.look()
            self._looked = now
        elif place in self._wanted:
            self._write(place)
        while self._bytes > self._most:
            self._bytes -= self._recent.popitem(last=False)[1].size

    def want(self, place: _Slice) -> None:
        """Ask all ranks, by a file, for the hidden states of a slice; of 64 at most."""
        self.look()
        if place not in self._wanted and len(self._wanted) < _MOST_WANTED:
            with contextlib.suppress(FileExistsError):
                name = self._folder / "wanted-{}.{}".format(*place)
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600))
            self._wanted.add(place)
            self._write(place)

    def look(self) -> None:
        """Read what all ranks ask for, and write what is here of it."""
        for path in self._folder.glob("wanted-*"):
            if mark := _WANTED.fullmatch(path.name):
                self._wanted.add((int(mark[1]), int(mark[2])))
        for place in self._wanted - self._written:
            self._write(place)

    def _write(self, place: _Slice) -> None:
        kept = self._recent.get(place)
        if kept is None or place in self._written:
            return
        if self._bytes_written + kept.size > self._most:
            if not self._said:
                tell(f"{self._folder} has {self._most >> 20} MiB of hidden states of this rank, and gets no more")
            self._said = True
            return
        content = tensors_bytes(self._place, place, kept.kind, kept.bits, kept.scales)
        write_private(self._folder / tensors_name(self._place.rank, *place), content)
        self._bytes_written += len(content)
        self._written.add(place)


def _part(scales: Any, tokens: int) -> Any:
    return None if scales is None else scales[:tokens].copy()
