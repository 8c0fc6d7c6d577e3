"""Parts of recorded routing as the slices of a trace: in order, checked, in bounded memory."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from distbench.errors import InvalidCase
from distbench.report.progress import Meter
from distbench.tools.recorded.readers import ALL_RANKS, Part, read_parts
from distbench.workload.trace_file import MOST_IDS, MOST_SLICES, Header, Slice, bad_ids, bad_weights

# Parts that are kept apart until all are read; each costs a hundred bytes besides its experts.
_MOST_ARRAYS = 1 << 22

_Tokens = tuple[NDArray[np.int32], NDArray[np.float32] | None]
_Parts = dict[tuple[int, int], dict[int, list[_Tokens]]]


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
        ordered = [one for rank in range(ep_size) for one in parts.get(rank, ())]
        counts = [sum(len(ids) for ids, _ in parts.get(rank, ())) for rank in range(ep_size)]
        if tokens_of.setdefault(step, counts) != counts:
            _refuse(named, f"step {step}: layer {layer} has {counts} tokens of the ranks, another {tokens_of[step]}")
        slices[step, layer] = _slice(named, ordered, counts, f"step {step}, layer {layer}")
    if not slices:
        _refuse(named, "no token in it")
    steps: dict[int, list[int]] = {}
    for step, layer in slices:
        steps.setdefault(step, []).append(layer)
    weighed = {one.weights is not None for one in slices.values()}
    if len(weighed) > 1:
        _refuse(named, "some layers or steps have weights, others have none")
    return Header("", num_experts, topk, ep_size, ", ".join(named)[:1000], steps, weighed.pop()), slices


def _slice(paths: list[str], parts: list[_Tokens], counts: list[int], place: str) -> Slice:
    ids = np.concatenate([ids for ids, _ in parts])
    known = [weights for _, weights in parts if weights is not None]
    if len(known) not in (0, len(parts)):
        _refuse(paths, f"{place}: some tokens have weights, others have none")
    weights = np.concatenate(known) if known else None
    problem = bad_weights(weights, ids)
    if problem:
        _refuse(paths, f"{place}: {problem}")
    return Slice(ids, np.array(counts, dtype=np.int64), weights)


def _collected(paths: list[str], num_experts: int, ep_size: int) -> tuple[_Parts, int]:
    found: _Parts = {}
    topk = total = arrays = 0
    with Meter("read routing") as meter:
        for path in paths:
            here: _Parts = {}
            for part in read_parts(path):
                ids, weights = _plain(path, part, num_experts)
                if not ids.size:
                    continue
                topk = topk or ids.shape[1]
                if ids.shape[1] != topk:
                    _refuse([path], f"step {part.step}: top-{ids.shape[1]}, elsewhere top-{topk}")
                total += ids.size
                if total > MOST_IDS or max(len(found), len(here)) > MOST_SLICES:
                    _refuse([path], f"more than {MOST_IDS} experts or {MOST_SLICES} steps and layers; give a part")
                meter.also = f"step {part.step}"
                arrays += 1
                if arrays > _MOST_ARRAYS:
                    _refuse([path], f"more than {_MOST_ARRAYS} runs of lines; sort them by step, layer and rank")
                for rank, one in _by_rank(path, part, (ids, weights), ep_size):
                    here.setdefault((part.step, part.layer), {}).setdefault(rank, []).append(one)
            _add(path, here, found)
    return found, topk


def _add(path: str, here: _Parts, found: _Parts) -> None:
    """Add a file's parts to those of earlier files, which have other ranks, steps or layers."""
    for (step, layer), ranks in here.items():
        known = found.setdefault((step, layer), {})
        if twice := known.keys() & ranks.keys():
            _refuse(
                [path],
                f"step {step}, layer {layer}: rank {min(twice)} is in an earlier file too; give each file once, and "
                "number the steps of several files one after the other",
            )
        known.update(ranks)


def _plain(path: str, part: Part, num_experts: int) -> _Tokens:
    """Experts of a part without the rows of -1 alone, which pad, and their weights."""
    if part.step < 0 or part.layer < 0 or part.step >= 1 << 53 or part.layer >= 1 << 20:
        _refuse([path], f"step {part.step}, layer {part.layer}: allowed are whole numbers from 0 up")
    used = (part.ids != -1).any(axis=1)
    ids, weights = part.ids[used], part.weights
    problem = bad_ids(ids, num_experts)
    if weights is not None and weights.shape != part.ids.shape:
        problem = f"weights {weights.shape} of experts {part.ids.shape}; give one for each"
    if problem:
        _refuse([path], f"step {part.step}, layer {part.layer}: {problem}")
    with np.errstate(over="ignore"):  # infinite ones are refused with the slice
        known = None if weights is None else np.asarray(weights[used], dtype=np.float32)
    return np.asarray(ids, dtype=np.int32), known


def _by_rank(path: str, part: Part, tokens: _Tokens, ep_size: int) -> list[tuple[int, _Tokens]]:
    ids, weights = tokens
    if part.rank == ALL_RANKS:
        shares = [None] * ep_size if weights is None else np.array_split(weights, ep_size)
        return list(enumerate(zip(np.array_split(ids, ep_size), shares, strict=True)))
    if not 0 <= part.rank < ep_size:
        _refuse([path], f"step {part.step} has rank {part.rank} of {ep_size} ranks; give --ep-size")
    return [(part.rank, tokens)]


def _refuse(paths: list[str], reason: str) -> NoReturn:
    message = f"trace {', '.join(paths)!r:.200}: {reason}"
    raise InvalidCase(message)
