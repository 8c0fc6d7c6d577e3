"""A capture's folder: the parts of all ranks as one trace, checked against the rows that production received."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from distbench.capture.part_file import COLUMNS, COUNTS, FORMAT, MOST_COUNTS_BYTES, PART, VERSION, Seen
from distbench.capture.settings import Place
from distbench.case.table_file import open_regular
from distbench.errors import InvalidCase
from distbench.report.progress import Meter
from distbench.utils.text import one_line
from distbench.workload.trace_file import MOST_IDS, MOST_SLICES, Header, Slice, bad_ids, bad_weights, open_trace

_MOST_NAMES = 1 << 20
_MOST_NUMBER = 1 << 24
_MOST_PART_BYTES = 1 << 30
_MOST_STEP, _MOST_LAYER = 1 << 53, 1 << 20
_LEFT_OUT = ("over_size", "behind", "in_graphs", "too_late")


class Violation(NamedTuple):
    """A dispatch that gave a rank more rows than its limit."""

    step: int
    layer: int
    rank: int
    total_recv: int
    limit: int


class Capture(NamedTuple):
    """What a folder has: a trace, the violations in it, and what is missing, as sentences."""

    header: Header
    slices: dict[tuple[int, int], Slice]
    violations: list[Violation]
    notes: list[str]


class _Found(NamedTuple):
    """Dispatches of all ranks: by step and layer, and then by rank."""

    place: Place
    source: str
    slices: dict[tuple[int, int], dict[int, Seen]]


def read_capture(folder: str) -> Capture:
    """The trace of a capture: its dispatches that all ranks have.

    Raises:
        InvalidCase: a part is not of the format, the parts are of several captures, or the routing does not give the
            rows that a rank received.

    """
    names = sorted(path.name for path in Path(folder).iterdir())
    if len(names) > _MOST_NAMES:
        _refuse(folder, f"more than {_MOST_NAMES} files")
    found = _collected(folder, [name for name in names if PART.fullmatch(name)])
    notes, kept = [*_counted(folder, names)], _complete(found)
    if len(kept) < len(found.slices):
        notes.append(f"{len(found.slices) - len(kept)} dispatches are left out: not of all {found.place.ep_size} ranks")
    slices: dict[tuple[int, int], Slice] = {}
    violations: list[Violation] = []
    tokens_of: dict[int, list[int]] = {}
    other = 0
    for (step, layer), ranks in sorted(kept.items()):
        one = _slice(folder, found.place, ranks)
        if tokens_of.setdefault(step, one.tokens.tolist()) != one.tokens.tolist():
            other += 1
            continue
        slices[step, layer] = one
        over = ((rank, seen) for rank, seen in sorted(ranks.items()) if 0 < seen.limit < seen.total_recv)
        violations += [Violation(step, layer, rank, seen.total_recv, seen.limit) for rank, seen in over]
    if other:
        notes.append(f"{other} dispatches are left out: other tokens than the step's first layer, as of a draft model")
    if not slices:
        _refuse(folder, f"no dispatch of all {found.place.ep_size} ranks")
    steps: dict[int, list[int]] = {}
    for step, layer in slices:
        steps.setdefault(step, []).append(layer)
    place = found.place
    problems = [(place, problem) for place, one in slices.items() if (problem := bad_weights(one.weights, one.ids))]
    weighed = not problems and all(one.weights is not None for one in slices.values())
    if problems:
        where, problem = problems[0]
        notes.append(f"weights are left out: step {where[0]}, layer {where[1]}: {problem}")
    header = Header("", place.num_experts, place.topk, place.ep_size, f"capture of {found.source}", steps, weighed)
    return Capture(header, slices, violations, notes)


def _collected(folder: str, names: list[str]) -> _Found:
    found: _Found | None = None
    total = 0
    with Meter("read the capture", len(names)) as meter:
        for name in names:
            place, source, dispatches = _part(str(Path(folder, name)))
            found = found or _Found(place, source, {})
            if place[1:] != found.place[1:]:
                _refuse(folder, f"{name} is of {place[1:]}, others of {found.place[1:]} ranks, experts and top-k")
            for seen in dispatches:
                total += seen.ids.size
                if total > MOST_IDS or len(found.slices) > MOST_SLICES:
                    _refuse(folder, f"more than {MOST_IDS} experts or {MOST_SLICES} steps and layers; take a part")
                if found.slices.setdefault((seen.step, seen.layer), {}).setdefault(place.rank, seen) is not seen:
                    _refuse(folder, f"rank {place.rank} has step {seen.step}, layer {seen.layer} twice")
            meter.done += 1
    if found is None:
        _refuse(folder, "no part of a capture; distbench.capture writes rank-00000.000000.safetensors and so on")
    return found


def _part(path: str) -> tuple[Place, str, list[Seen]]:
    """A part's place, source and dispatches."""
    if Path(path).stat().st_size > _MOST_PART_BYTES:
        _refuse(path, f"more than {_MOST_PART_BYTES >> 30} GiB, which no part has")
    opened = open_trace(path)
    metadata = opened.metadata() or {}
    if (metadata.get("format"), metadata.get("version")) != (FORMAT, VERSION):
        _refuse(path, f"not a part of version {VERSION} of a capture")
    place = Place(*(_number(path, metadata, name) for name in Place._fields))
    if not place.rank < place.ep_size or place.ep_size > place.num_experts or place.num_experts % place.ep_size:
        _refuse(path, f"{place}: experts are shared evenly by the ranks")
    try:
        table, ids = opened.get_tensor("slices"), opened.get_tensor("ids")
        weights = opened.get_tensor("weights") if "weights" in opened.keys() else None  # noqa: SIM118 - not a dict
    except Exception as error:  # noqa: BLE001 - safetensors has no common class of its errors
        _refuse(path, one_line(error), error)
    if table.dtype != np.int64 or table.ndim != 2 or table.shape[1] != len(COLUMNS) or (table < 0).any():  # noqa: PLR2004
        _refuse(path, f"slices {table.dtype} {table.shape} are not of the format")
    if (table[:, 0] >= _MOST_STEP).any() or (table[:, 1] >= _MOST_LAYER).any():
        _refuse(path, f"a step or layer beyond {_MOST_STEP} and {_MOST_LAYER}")
    count = int(table[:, 2].clip(0, MOST_IDS).sum())
    if ids.dtype != np.int32 or ids.shape != (count, place.topk):
        _refuse(path, f"ids {ids.dtype} {ids.shape}, the dispatches have {(count, place.topk)}")
    if weights is not None and (weights.dtype != np.float32 or weights.shape != ids.shape):
        _refuse(path, f"weights {weights.dtype} {weights.shape}, ids {ids.shape}")
    return place, metadata.get("source", "")[:200], list(_dispatches(table, ids, weights))


def _dispatches(table: NDArray[Any], ids: NDArray[Any], weights: NDArray[Any] | None) -> Iterator[Seen]:
    start = 0
    for step, layer, count, total_recv, limit in table.tolist():
        part = slice(start, start + count)
        yield Seen(step, layer, ids[part], None if weights is None else weights[part], total_recv, limit)
        start += count


def _complete(found: _Found) -> dict[tuple[int, int], dict[int, Seen]]:
    return {where: ranks for where, ranks in found.slices.items() if len(ranks) == found.place.ep_size}


def _slice(folder: str, place: Place, ranks: dict[int, Seen]) -> Slice:
    """The tokens of all ranks, without rows of -1 alone, which go nowhere; checked against the rows received."""
    step, layer, *_ = ranks[0]
    ordered = [ranks[rank] for rank in range(place.ep_size)]
    used = [(seen.ids != -1).any(axis=1) for seen in ordered]
    ids = np.concatenate([seen.ids[here] for seen, here in zip(ordered, used, strict=True)])
    known = [seen.weights[here] for seen, here in zip(ordered, used, strict=True) if seen.weights is not None]
    weights = np.concatenate(known) if len(known) == place.ep_size else None
    one = Slice(ids, np.array([here.sum() for here in used], dtype=np.int64), weights)
    problem = bad_ids(ids, place.num_experts)
    if problem:
        _refuse(folder, f"step {step}, layer {layer}: {problem}")
    computed = one.received(place.num_experts).tolist()
    for rank, rows in enumerate(computed):
        if rows != ranks[rank].total_recv:
            _refuse(
                folder,
                f"step {step}, layer {layer}: rank {rank} received {ranks[rank].total_recv} rows, the recorded experts "
                f"of all ranks give {rows}: their steps are not the same ones; start the capture with the server",
            )
    return one


def _counted(folder: str, names: list[str]) -> Iterator[str]:
    """What the ranks left out, and the errors that ended a rank's capture."""
    left_out: Counter[str] = Counter()
    for name in names:
        if not COUNTS.fullmatch(name):
            continue
        try:
            with os.fdopen(open_regular(str(Path(folder, name))), "rb") as stream:
                counts = msgspec.json.decode(stream.read(MOST_COUNTS_BYTES), type=dict[str, Any])
        except (OSError, ValueError) as error:
            _refuse(folder, f"{name}: {one_line(error)}", error)
        left_out.update({key: counts[key] for key in _LEFT_OUT if isinstance(counts.get(key), int)})
        if counts.get("error"):
            yield f"{name}: the capture ended: {one_line(str(counts['error']))[:300]}"
    told = {
        "over_size": "beyond the size allowed",
        "behind": "while the writer was behind",
        "in_graphs": "while a graph was captured, whose replays nobody sees",
        "too_late": "around violations that a rank heard of too late",
    }
    yield from (f"{left_out[key]} dispatches were not recorded: {why}" for key, why in told.items() if left_out[key])


def _number(path: str, metadata: dict[str, str], name: str) -> int:
    text = metadata.get(name, "")
    least = 0 if name == "rank" else 1
    if not re.fullmatch(r"\d{1,8}", text, re.ASCII) or not least <= int(text) <= _MOST_NUMBER:
        _refuse(path, f"{name} = {text!r:.40} in its metadata; allowed are whole numbers to {_MOST_NUMBER}")
    return int(text)


def _refuse(path: str, reason: str, cause: BaseException | None = None) -> NoReturn:
    message = f"capture {path!r:.200}: {reason}"
    raise InvalidCase(message) from cause
