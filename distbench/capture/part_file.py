"""Files of a capture: parts with what one rank saw, and its counts. Loads no torch.

A part is a safetensors file. Its metadata are `format` (distbench-capture), `version` (1), `rank`, `ep_size`,
`num_experts`, `topk`, `every` and `source`, all text. Its tensors are `slices` int64 [m, 5] with step, layer, tokens,
total_recv and limit (0: none) of each dispatch, `ids` int32 [n, k], the experts of their tokens one after the other,
and `weights` float32 [n, k] where they were asked for.

The hidden states of a dispatch have a file of their own: `hidden`, uint16 [n, H] with the bits of bf16 or uint8 [n, H]
with those of fp8, and `scales` float32 [n, H / 128] of fp8; `kind` in the metadata is the format.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import secrets
import stat
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from distbench.capture.settings import Place

FORMAT, VERSION = "distbench-capture", "1"
PART = re.compile(r"rank-(\d{5})\.(\d{6})\.safetensors", re.ASCII)
TENSORS = re.compile(r"rank-(\d{5})\.tensors-(\d{1,15})\.(\d{1,7})\.safetensors", re.ASCII)
COUNTS = re.compile(r"rank-(\d{5})\.json", re.ASCII)
COLUMNS = ("step", "layer", "tokens", "total_recv", "limit")
FOLDER_MODE, FILE_MODE = 0o700, 0o600
MOST_COUNTS_BYTES = 64 << 10


class Seen(NamedTuple):
    """One dispatch on one rank: ids int32 [n, k], weights float32 [n, k] where asked for, total_recv and limit."""

    step: int
    layer: int
    ids: NDArray[np.int32]
    weights: NDArray[np.float32] | None
    total_recv: int
    limit: int

    @property
    def size(self) -> int:
        """Bytes in a file."""
        return self.ids.nbytes + (0 if self.weights is None else self.weights.nbytes) + 8 * len(COLUMNS)


def part_name(rank: int, number: int) -> str:
    """Name of the part `number` of a rank."""
    return f"rank-{rank:05d}.{number:06d}.safetensors"


def tensors_name(rank: int, step: int, layer: int) -> str:
    """Name of the hidden states that a rank sent in a step and layer."""
    return f"rank-{rank:05d}.tensors-{step}.{layer}.safetensors"


def tensors_bytes(place: Place, slice_of: tuple[int, int], kind: str, bits: NDArray[Any], scales: Any) -> bytes:
    """Content of the hidden states of a step and layer: bits [n, H] of the format `kind`, scales or None."""
    from safetensors.numpy import save  # noqa: PLC0415 - as below

    tensors = {"hidden": bits} if scales is None else {"hidden": bits, "scales": scales}
    numbers = {**place._asdict(), "step": slice_of[0], "layer": slice_of[1]}
    metadata = {"format": FORMAT, "version": VERSION, "kind": kind}
    return bytes(save(tensors, metadata | {name: str(value) for name, value in numbers.items()}))


def counts_name(rank: int) -> str:
    """Name of the counts of a rank."""
    return f"rank-{rank:05d}.json"


def part_bytes(place: Place, every: int, source: str, seen: list[Seen]) -> bytes:
    """Content of a part with at least one dispatch."""
    from safetensors.numpy import save  # noqa: PLC0415 - in the writer's thread, not where a server imports

    table = [[one.step, one.layer, len(one.ids), one.total_recv, one.limit] for one in seen]
    tensors: dict[str, Any] = {
        "slices": np.array(table, dtype=np.int64),
        "ids": np.concatenate([one.ids for one in seen]),
    }
    weights = [one.weights for one in seen if one.weights is not None]
    if weights:
        tensors["weights"] = np.concatenate(weights)
    numbers = {**place._asdict(), "every": every}
    metadata = {"format": FORMAT, "version": VERSION, "source": source}
    return bytes(save(tensors, metadata | {name: str(value) for name, value in numbers.items()}))


def counts_bytes(place: Place, counts: dict[str, Any]) -> bytes:
    """Content of a rank's counts."""
    return json.dumps({"format": FORMAT, "version": VERSION, **place._asdict(), **counts}, indent=1).encode() + b"\n"


def prepare_folder(folder: Path, rank: int, counts: bytes) -> None:
    """Make the folder of a capture, for its owner alone, and the file of the rank's counts, which claims it.

    Raises:
        OSError: it cannot be made.
        ValueError: it is no folder, is open to others, or has another capture of this rank.

    """
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=FOLDER_MODE)
    found = folder.stat()
    if not stat.S_ISDIR(found.st_mode):
        message = f"{folder} is no folder; give another name"
        raise ValueError(message)
    if found.st_uid != os.getuid() or found.st_mode & 0o077:
        message = f"{folder} is another user's, or open to others (mode {found.st_mode & 0o777:o}); chmod 700 it"
        raise ValueError(message)
    if (folder / part_name(rank, 0)).exists() or not _made(folder / counts_name(rank), counts):
        message = f"{folder} has another capture of rank {rank}; give another folder"
        raise ValueError(message)


def _made(path: Path, content: bytes) -> bool:
    """Make a private file; False where there is one. Of two processes one makes it."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, FILE_MODE)
    except FileExistsError:
        return False
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
    except BaseException:
        path.unlink()
        raise
    return True


def write_private(path: Path, content: bytes) -> None:
    """Write a file that appears whole or not at all, and that its owner alone reads.

    Raises:
        OSError: it cannot be written.

    """
    unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    descriptor = os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, FILE_MODE)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        unfinished.replace(path)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
