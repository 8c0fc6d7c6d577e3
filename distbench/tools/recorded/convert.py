"""Parts of recorded routing as the slices of a trace: in order, checked, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from distbench.errors import InvalidCase
from distbench.report.progress import Meter
from distbench.tools.recorded.readers import ALL_RANKS, Part, read_parts
from distbench.workload.trace_file import MOST_IDS, MOST_SLICES, Header, Slice, bad_ids

# Parts that are kept apart until all are read; each costs a hundred bytes besides its experts.
_MOST_ARRAYS = 1 << 22

_Parts = dict[tuple[int, int], dict[int, list[NDArray[np.int32]]]]


def convert(paths: Iterable[str], num_experts: int, ep_size: int) -> tuple[Header, dict[tuple[int, int], Slice]]:
    """Header and slices of a trace of several files, as one each rank has.

    Raises:
        InvalidCase: a file cannot be read, or its tokens are none of this layer.

    """
    named = list(paths)
    found, topk = _collected(named, num_experts, ep_size)
    slices: dict[tuple[int, int], Slice] = {}
    tokens_of: dict[int, list[int]] = {}
    for (step, layer), parts in sorted(found.items()):
        empty = np.zeros((0, topk), dtype=np.int32)
        ranks = [np.concatenate(parts[rank]) if rank in parts else empty for rank in range(ep_size)]
        counts = [len(ids) for ids in ranks]
        if tokens_of.setdefault(step, counts) != counts:
            _refuse(named, f"step {step}: layer {layer} has {counts} tokens of the ranks, another {tokens_of[step]}")
        slices[step, layer] = Slice(np.concatenate(ranks), np.array(counts, dtype=np.int64))
    if not slices:
        _refuse(named, "no token in it")
    steps: dict[int, list[int]] = {}
    for step, layer in slices:
        steps.setdefault(step, []).append(layer)
    return Header("", num_experts, topk, ep_size, ", ".join(named)[:1000], steps), slices


def _collected(paths: list[str], num_experts: int, ep_size: int) -> tuple[_Parts, int]:
    found: _Parts = {}
    topk = total = arrays = 0
    with Meter("read routing") as meter:
        for path in paths:
            for part in read_parts(path):
                ids = _plain(path, part, num_experts)
                if not ids.size:
                    continue
                topk = topk or ids.shape[1]
                if ids.shape[1] != topk:
                    _refuse([path], f"step {part.step}: top-{ids.shape[1]}, elsewhere top-{topk}")
                total += ids.size
                if total > MOST_IDS or len(found) > MOST_SLICES:
                    _refuse([path], f"more than {MOST_IDS} experts or {MOST_SLICES} steps and layers; give a part")
                meter.also = f"step {part.step}"
                arrays += 1
                if arrays > _MOST_ARRAYS:
                    _refuse([path], f"more than {_MOST_ARRAYS} runs of lines; sort them by step, layer and rank")
                for rank, one in _by_rank(path, part, ids, ep_size):
                    found.setdefault((part.step, part.layer), {}).setdefault(rank, []).append(one)
    return found, topk


def _plain(path: str, part: Part, num_experts: int) -> NDArray[np.int32]:
    """Experts of a part without the rows of -1 alone, which pad."""
    if part.step < 0 or part.layer < 0 or part.step >= 1 << 53 or part.layer >= 1 << 20:
        _refuse([path], f"step {part.step}, layer {part.layer}: allowed are whole numbers from 0 up")
    ids = part.ids[(part.ids != -1).any(axis=1)]
    problem = bad_ids(ids, num_experts)
    if problem:
        _refuse([path], f"step {part.step}, layer {part.layer}: {problem}")
    return np.asarray(ids, dtype=np.int32)


def _by_rank(path: str, part: Part, ids: NDArray[np.int32], ep_size: int) -> list[tuple[int, NDArray[np.int32]]]:
    if part.rank == ALL_RANKS:
        return list(enumerate(np.array_split(ids, ep_size)))
    if not 0 <= part.rank < ep_size:
        _refuse([path], f"step {part.step} has rank {part.rank} of {ep_size} ranks; give --ep-size")
    return [(part.rank, ids)]


def _refuse(paths: list[str], reason: str) -> NoReturn:
    message = f"trace {', '.join(paths)!r:.200}: {reason}"
    raise InvalidCase(message)
