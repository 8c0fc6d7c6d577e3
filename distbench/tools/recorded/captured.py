"""A capture's folder: the parts of all ranks as one trace, checked against the rows that production received."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from distbench.capture.part_file import COLUMNS, COUNTS, FORMAT, MOST_COUNTS_BYTES, PART, VERSION, Seen
from distbench.capture.settings import Place
from distbench.case.table_file import open_regular
from distbench.errors import InvalidCase
from distbench.report.progress import Meter
from distbench.tools.recorded.captured_tensors import captured_tensors
from distbench.utils.text import counted, one_line
from distbench.workload.trace_file import (
    MOST_IDS,
    MOST_SLICES,
    Header,
    Slice,
    bad_ids,
    bad_weights,
    open_trace,
    with_tensors,
)

_MOST_NAMES = 1 << 20
_MOST_NUMBER = 1 << 24
_MOST_PART_BYTES = 1 << 30
_MOST_STEP, _MOST_LAYER = 1 << 53, 1 << 20
_PADDING = "gave rank 0 the rows of padding (ids of -1) as well, which the trace lacks"
_Count = Annotated[int, msgspec.Meta(ge=0, le=1 << 53)]


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


class _LeftOut(msgspec.Struct):
    """What a rank's counts say was left out, and the error that ended its capture."""

    over_size: _Count = 0
    behind: _Count = 0
    in_graphs: _Count = 0
    too_late: _Count = 0
    tensors_lost: _Count = 0
    tensors_unlike: _Count = 0
    tensors_behind: _Count = 0
    error: str = ""


def read_capture(folder: str, *, tensors: bool = True) -> Capture:
    """The trace of a capture: its dispatches that all ranks have, without their hidden states unless `tensors`.

    Raises:
        InvalidCase: a part is not of the format, the parts are of several captures, or the routing does not give the
            rows that a rank received.

    """
    names = sorted(path.name for path in Path(folder).iterdir())
    if len(names) > _MOST_NAMES:
        _refuse(folder, f"more than {_MOST_NAMES} files")
    found = _collected(folder, [name for name in names if PART.fullmatch(name)])
    slices, notes = _merged(folder, found)
    if not slices:
        _refuse(folder, "; ".join(["nothing to convert", *notes]))
    steps: dict[int, list[int]] = {}
    for step, layer in slices:
        steps.setdefault(step, []).append(layer)
    place = found.place
    weighed = all(one.weights is not None for one in slices.values())
    header = Header("", place.num_experts, place.topk, place.ep_size, f"capture of {found.source}", steps, weighed)
    if tensors:
        hidden, told = captured_tensors(folder, names, found.slices, place.ep_size)
        notes += told
        slices |= {one: slices[one]._replace(tensors=hidden[one]) for one in slices.keys() & hidden.keys()}
        header = with_tensors(header, slices)
    return Capture(header, slices, list(_violations(found)), [*_counted(folder, names), *notes])


def _violations(found: _Found) -> Iterator[Violation]:
    for (step, layer), ranks in sorted(found.slices.items()):
        for rank, seen in sorted(ranks.items()):
            if 0 < seen.limit < seen.total_recv:
                yield Violation(step, layer, rank, seen.total_recv, seen.limit)


def _merged(folder: str, found: _Found) -> tuple[dict[tuple[int, int], Slice], list[str]]:
    """Slices that all ranks have, and what is left out of them, as sentences."""
    slices: dict[tuple[int, int], Slice] = {}
    tokens_of: dict[int, list[int]] = {}
    left_out: Counter[str] = Counter()
    for (step, layer), ranks in sorted(found.slices.items()):
        if len(ranks) < found.place.ep_size:
            left_out[f"not of all {counted(found.place.ep_size, 'rank')}"] += 1
            continue
        one = _slice(found.place, ranks)
        if bad_ids(one.ids, found.place.num_experts):
            left_out["a token has -1 beside experts, one twice, or one that there is not"] += 1
        elif tokens_of.setdefault(step, one.tokens.tolist()) != one.tokens.tolist():
            left_out["other tokens than the step's first layer, as of a draft model"] += 1
        else:
            left_out[_PADDING] += _check_rows(folder, found.place, ranks, one)
            slices[step, layer] = one
    padded = left_out.pop(_PADDING, 0)
    notes = [f"{counted(count, 'dispatch')} left out: {why}" for why, count in left_out.items()]
    if padded:
        notes.append(f"{counted(padded, 'dispatch')} {_PADDING}")
    problems = [(where, problem) for where, one in slices.items() if (problem := bad_weights(one.weights, one.ids))]
    if problems:
        (step, layer), problem = problems[0]
        notes.append(f"weights are left out: step {step}, layer {layer}: {problem}")
        slices = {where: one._replace(weights=None) for where, one in slices.items()}
    return slices, notes


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
    if len(table) > MOST_SLICES:
        _refuse(path, f"{counted(len(table), 'dispatch')}; a trace has at most {MOST_SLICES} steps and layers")
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


def _slice(place: Place, ranks: dict[int, Seen]) -> Slice:
    """The tokens of all ranks, without rows of -1 alone, which pad."""
    ordered = [ranks[rank] for rank in range(place.ep_size)]
    used = [(seen.ids != -1).any(axis=1) for seen in ordered]
    ids = np.concatenate([seen.ids[here] for seen, here in zip(ordered, used, strict=True)])
    known = [seen.weights[here] for seen, here in zip(ordered, used, strict=True) if seen.weights is not None]
    weights = np.concatenate(known) if len(known) == place.ep_size else None
    return Slice(ids, np.array([here.sum() for here in used], dtype=np.int64), weights)


def _check_rows(folder: str, place: Place, ranks: dict[int, Seen], one: Slice) -> bool:
    """Check the rows that each rank received against the recorded experts; True where rank 0 got those of padding too.

    Some kernels of MoRI send a row of -1 to rank 0 (`SKIPS_NEGATIVE` of transport/mori/config.py has the others).
    """
    step, layer, *_ = ranks[0]
    padding = sum(len(seen.ids) for seen in ranks.values()) - len(one.ids)
    computed: list[int] = one.received(place.num_experts).tolist()
    padded = 0 < padding == ranks[0].total_recv - computed[0]
    for rank, rows in enumerate(computed):
        if rows != ranks[rank].total_recv and not (padded and rank == 0):
            _refuse(
                folder,
                f"step {step}, layer {layer}: rank {rank} received {ranks[rank].total_recv} rows, the recorded experts "
                f"of all ranks give {rows}: their steps are not the same ones; start the capture with the server",
            )
    return padded


def _counted(folder: str, names: list[str]) -> Iterator[str]:
    """What the ranks left out, and the errors that ended a rank's capture."""
    told = {
        "over_size": "beyond the size allowed",
        "behind": "while the writer was behind",
        "in_graphs": "while a graph was captured, whose replays are not seen",
        "too_late": "around violations that a rank heard of too late",
    }
    of_tensors = {
        "tensors_lost": "were asked for and no more in memory, or beyond the size allowed",
        "tensors_unlike": "are of another format than bf16 or fp8 with a scale for 128 columns",
        "tensors_behind": "came while the writer was behind, or had no room",
    }
    left_out: Counter[str] = Counter()
    for name in names:
        if not COUNTS.fullmatch(name):
            continue
        try:
            with os.fdopen(open_regular(str(Path(folder, name))), "rb") as stream:
                counts = msgspec.json.decode(stream.read(MOST_COUNTS_BYTES), type=_LeftOut)
        except (OSError, ValueError) as error:
            _refuse(folder, f"{name}: {one_line(error)}", error)
        left_out.update({key: getattr(counts, key) for key in (*told, *of_tensors)})
        if counts.error:
            yield f"{name}: the capture ended: {one_line(counts.error)[:300]}"
    yield from (
        f"{counted(left_out[key], 'dispatch')} not recorded: {why}" for key, why in told.items() if left_out[key]
    )
    yield from (
        f"hidden states of {counted(left_out[key], 'dispatch')} {why}"
        for key, why in of_tensors.items()
        if left_out[key]
    )


def _number(path: str, metadata: dict[str, str], name: str) -> int:
    text = metadata.get(name, "")
    least = 0 if name == "rank" else 1
    if not re.fullmatch(r"\d{1,8}", text, re.ASCII) or not least <= int(text) <= _MOST_NUMBER:
        _refuse(path, f"{name} = {text!r:.40} in its metadata; allowed are whole numbers to {_MOST_NUMBER}")
    return int(text)


def _refuse(path: str, reason: str, cause: BaseException | None = None) -> NoReturn:
    message = f"capture {path!r:.200}: {reason}"
    raise InvalidCase(message) from cause
