"""Recorded routing: the experts of each token by step, layer and rank, in a safetensors file. Needs no torch.

A file holds `tokens.STEP`, int64 [W], the tokens of each rank in a step, and `ids.STEP.LAYER`, int32 [n, k], the
experts of the step's n tokens in a layer: those of rank 0 first, then of rank 1, and so on; `weights.STEP.LAYER`,
float32 [n, k], are their routing weights, of all slices or of none. Its metadata are `format` (distbench-trace),
`version` (1), `num_experts`, `topk`, `ep_size` and `source`. Some slices may have their tokens' hidden states
(`workload.trace_tensors`), whose format and size are the metadata `hidden` and `hidden_size`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from io import BytesIO
from math import prod
from typing import Any, BinaryIO, NamedTuple, NoReturn

import numpy as np
from numpy.typing import NDArray

from distbench.case.table_file import open_regular
from distbench.errors import InvalidCase
from distbench.utils.text import one_line
from distbench.workload.trace_tensors import BF16, BLOCK, WORDS, Tensors, bad_tensors, map_tensors, pieces

FORMAT, VERSION = "distbench-trace", "1"
MOST_IDS, MOST_SLICES = 1 << 28, 1 << 17
_MOST_NUMBER = 1 << 24
_ALIGNMENT = 8
_BYTES_OF = {"I64": 8, "I32": 4, "F32": 4, "U16": 2, "U8": 1}
_SLICE = re.compile(r"(ids|hidden)\.(0|[1-9]\d{0,15})\.(0|[1-9]\d{0,6})", re.ASCII)
_MOST_HIDDEN = 1 << 16

_SAME_SUM = 0.01
"""Share by which the sums of tokens' weights may differ: they are rounded, and of bf16 in some programs."""
_MOST_SUM = 1024
"""Factors of models are small numbers. Far from 1, outputs leave the range in which errors of bf16 are relative."""

Ids = NDArray[np.int32]
Weights = NDArray[np.float32]


class Header(NamedTuple):
    """Contents of a file: its layer, the layers of each step, both ascending, and whether it has routing weights.

    `hidden` is the format of the hidden states [., hidden_size] of the slices `recorded`, by step and layer.
    """

    path: str
    num_experts: int
    topk: int
    ep_size: int
    source: str
    steps: dict[int, list[int]]
    weighed: bool = False
    hidden: str = ""
    hidden_size: int = 0
    recorded: frozenset[tuple[int, int]] = frozenset()


class Slice(NamedTuple):
    """One step in one layer: ids int32 [n, k], tokens int64 [W] of each rank, and weights float32 [n, k] or None.

    `tensors` are the tokens' hidden states, where they were recorded and are asked for.
    """

    ids: Ids
    tokens: NDArray[np.int64]
    weights: Weights | None = None
    tensors: Tensors | None = None

    def received(self, num_experts: int, *, own: bool = False) -> NDArray[np.int64]:
        """Rows that each rank receives, int64 [W], where the ranks hold equally many experts in order.

        With `own` each token has a row on its own rank as well, as a shared expert in a slot of each rank demands.
        """
        ranks = len(self.tokens)
        owners = self.ids // max(num_experts // ranks, 1)
        if own:
            owners = np.column_stack([owners, np.repeat(np.arange(ranks), self.tokens)])
        owners = np.sort(owners, axis=1)
        first = np.ones(owners.shape, dtype=bool)
        first[:, 1:] = owners[:, 1:] != owners[:, :-1]
        return np.bincount(owners[first], minlength=ranks)


def read_header(path: str) -> Header:
    """Contents of a trace.

    Raises:
        InvalidCase: no such file, not a trace, or of another version.

    """
    opened = open_trace(path)
    metadata = opened.metadata() or {}
    if metadata.get("format") != FORMAT:
        _refuse(path, "not a recorded routing of distbench; `distbench trace convert` makes one")
    if metadata.get("version") != VERSION:
        _refuse(path, f"version {metadata.get('version')!r:.20} of the format; this distbench reads {VERSION}")
    experts, topk, ranks = (_number(path, metadata, name) for name in ("num_experts", "topk", "ep_size"))
    steps: dict[int, list[int]] = {}
    weighed, recorded = False, set()
    for name in opened.keys():  # noqa: SIM118 - not a dict
        weighed |= name.startswith("weights.")
        found = _SLICE.fullmatch(name)
        if found and found[1] == "ids":
            steps.setdefault(int(found[2]), []).append(int(found[3]))
        elif found:
            recorded.add((int(found[2]), int(found[3])))
    if not steps:
        _refuse(path, "no step in it")
    ordered = {step: sorted(steps[step]) for step in sorted(steps)}
    header = Header(path, experts, topk, ranks, metadata.get("source", ""), ordered, weighed)
    return header._replace(recorded=frozenset(recorded), **_hidden_of(path, metadata)) if recorded else header


def _hidden_of(path: str, metadata: Mapping[str, str]) -> dict[str, Any]:
    kind, size = metadata.get("hidden", ""), _number(path, metadata, "hidden_size")
    if kind not in WORDS or size > _MOST_HIDDEN or (kind != BF16 and size % BLOCK):
        known = f"{', '.join(WORDS)}, at most {_MOST_HIDDEN} columns, with fp8 a multiple of {BLOCK}"
        _refuse(path, f"hidden states {kind!r:.40} of {size} columns; allowed are {known}")
    return {"hidden": kind, "hidden_size": size}


def read_tensors(header: Header, step: int, layer: int, tokens: int) -> Tensors | None:
    """The hidden states of a slice of `tokens` tokens, mapped and checked; None where they were not recorded.

    Raises:
        InvalidCase: they are not of the format, not finite, or of magnitudes that no layer dispatches.

    """
    if (step, layer) not in header.recorded:
        return None
    names = f"hidden.{step}.{layer}", f"scales.{step}.{layer}"
    tensors = map_tensors(header.path, names, header.hidden, (tokens, header.hidden_size))
    problem = bad_tensors(tensors)
    if problem:
        _refuse(header.path, f"step {step}, layer {layer}: {problem}")
    return tensors


def read_slice(header: Header, step: int, layer: int, opened: Any = None) -> Slice:
    """A step in a layer, checked: each token has k distinct experts of the model, and a router's weights if it has any.

    To read many slices, give what `open_trace` returned: each opening reads the names of all slices.

    Raises:
        InvalidCase: not in the file, or tokens that no layer routes.

    """
    path = header.path
    if layer not in header.steps.get(step, ()):
        first = next(iter(header.steps))
        _refuse(path, f"no step {step} with layer {layer}; the first is {first} with {header.steps[first][0]}")
    opened = open_trace(path) if opened is None else opened
    try:
        ids, tokens = opened.get_tensor(f"ids.{step}.{layer}"), opened.get_tensor(f"tokens.{step}")
        weights = opened.get_tensor(f"weights.{step}.{layer}") if header.weighed else None
    except Exception as error:  # noqa: BLE001 - safetensors has no common class of its errors
        _refuse(path, f"step {step}, layer {layer}: {one_line(error)}", error)
    place = f"step {step}, layer {layer}"
    if ids.dtype != np.int32 or tokens.dtype != np.int64 or tokens.shape != (header.ep_size,):
        _refuse(path, f"{place}: ids {ids.dtype} and tokens {tokens.dtype} {tokens.shape} are not of the format")
    if (tokens < 0).any() or (tokens > MOST_IDS).any() or ids.shape != (int(tokens.sum()), header.topk):
        _refuse(path, f"{place}: ids {ids.shape}, the ranks' tokens and top-k are {(int(tokens.sum()), header.topk)}")
    problem = bad_ids(ids, header.num_experts) or bad_weights(weights, ids)
    if problem:
        _refuse(path, f"{place}: {problem}")
    return Slice(ids, tokens, weights)


def bad_ids(ids: Ids, num_experts: int) -> str:
    """The first token of ids [n, k] whose experts no layer chooses, as text; empty for none."""
    outside = ((ids < 0) | (ids >= num_experts)).any(axis=1)
    ordered = np.sort(ids, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    for bad, reason in ((outside, f"experts are 0 to {num_experts - 1}"), (twice, "an expert twice")):
        if bad.any():
            token = int(np.flatnonzero(bad)[0])
            return f"token {token} has experts {ids[token].tolist()}: {reason}"
    return ""


def bad_weights(weights: Weights | None, ids: Ids) -> str:
    """Why weights [n, k] are not those of a router, as text; empty where they are, or are None.

    They are finite and not negative, and the sums of all tokens are the same one within 1 %, 1 or the model's factor,
    from 1 / 1024 to 1024. Tokens of zeros alone, which some programs make of padding, are left aside, but not if all
    are: no output would depend on an expert.
    """
    if weights is None:
        return ""
    if weights.dtype != np.float32 or weights.shape != ids.shape:
        return f"weights {weights.dtype} {weights.shape}, float32 {ids.shape} are of the format"
    wrong = ~(np.isfinite(weights) & (weights >= 0)).all(axis=1)
    if wrong.any():
        token = int(np.flatnonzero(wrong)[0])
        return f"token {token} has weights {weights[token].tolist()}: allowed are finite ones, not below 0"
    sums = weights.sum(axis=1, dtype=np.float64)
    most = sums.max(initial=0)
    if len(sums) and not 1 / _MOST_SUM <= most <= _MOST_SUM:
        bounds = f"1 / {_MOST_SUM} to {_MOST_SUM}"
        return f"the weights of a token sum to at most {most:.4g}: allowed are {bounds}; leave others out"
    low = np.flatnonzero((sums > 0) & (sums < most * (1 - _SAME_SUM)))
    if len(low):
        token = int(low[0])
        return f"the weights of token {token} sum to {sums[token]:.4g}, others to {most:.4g}: give normalised ones"
    return ""


def trace_bytes(header: Header, slices: Mapping[tuple[int, int], Slice]) -> bytes:
    """Content of a trace's file; slices are by step and layer, whatever the header's steps."""
    steps: dict[int, list[int]] = {}
    for step, layer in sorted(slices):
        steps.setdefault(step, []).append(layer)
    stream, tokens = BytesIO(), {step: slices[step, layers[0]].tokens for step, layers in steps.items()}
    weighed = all(one.weights is not None for one in slices.values())
    told = with_tensors(header._replace(steps=steps, weighed=weighed), slices)
    write_trace(stream, told, tokens, (slices[place] for place in sorted(slices)))
    return stream.getvalue()


def with_tensors(header: Header, slices: Mapping[tuple[int, int], Slice]) -> Header:
    """The header with the hidden states that slices have, which are all of one format and size."""
    found = {place: one.tensors for place, one in slices.items() if one.tensors is not None}
    kinds = {(one.kind, one.hidden_size) for one in found.values()}
    kind, size = kinds.pop() if kinds else ("", 0)
    assert not kinds  # noqa: S101 - those that read them refuse others
    return header._replace(hidden=kind, hidden_size=size, recorded=frozenset(found))


def write_trace(
    stream: BinaryIO, header: Header, tokens: Mapping[int, NDArray[np.int64]], slices: Iterable[Slice]
) -> None:
    """Write a trace's file, one slice in memory at a time, in the order of the header's steps and layers.

    `tokens` are those of each rank, int64 [W], by step: all layers of a step have the same.
    """
    numbers = {"num_experts": header.num_experts, "topk": header.topk, "ep_size": header.ep_size}
    metadata = {"format": FORMAT, "version": VERSION, "source": header.source}
    if header.recorded:
        numbers["hidden_size"], metadata["hidden"] = header.hidden_size, header.hidden
    described: dict[str, Any] = {"__metadata__": metadata | {name: str(value) for name, value in numbers.items()}}
    end = 0
    for name, kind, shape in _tensors(header, tokens):
        start, end = end, end + prod(shape) * _BYTES_OF[kind]
        described[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    stream.write(len(text).to_bytes(_ALIGNMENT, "little") + text)
    stream.writelines(np.ascontiguousarray(tokens[step], dtype="<i8").data for step in header.steps)
    for one in slices:
        stream.write(np.ascontiguousarray(one.ids, dtype="<i4").data)
        if header.weighed:
            stream.write(np.ascontiguousarray(one.weights, dtype="<f4").data)
        if one.tensors is not None:
            stream.writelines(np.ascontiguousarray(bits).data for bits, _ in pieces(one.tensors))
            stream.writelines(np.ascontiguousarray(part, dtype="<f4").data for part in one.tensors.scales)


def _tensors(header: Header, tokens: Mapping[int, NDArray[np.int64]]) -> Iterator[tuple[str, str, list[int]]]:
    """Names, types and shapes of a trace's tensors, in the order of the file."""
    for step in header.steps:
        yield f"tokens.{step}", "I64", [header.ep_size]
    for step, layers in header.steps.items():
        for layer in layers:
            shape = [int(tokens[step].sum()), header.topk]
            yield f"ids.{step}.{layer}", "I32", shape
            if header.weighed:
                yield f"weights.{step}.{layer}", "F32", shape
            if (step, layer) in header.recorded:
                yield f"hidden.{step}.{layer}", WORDS[header.hidden], [shape[0], header.hidden_size]
                if header.hidden != BF16:
                    yield f"scales.{step}.{layer}", "F32", [shape[0], header.hidden_size // BLOCK]


def open_trace(path: str) -> Any:
    """The open file of a trace, for several slices.

    Raises:
        InvalidCase: not a regular file, or no safetensors.

    """
    from safetensors import safe_open  # noqa: PLC0415 - only runs with a trace pay for it

    try:
        os.close(open_regular(path))
        return safe_open(path, framework="numpy")
    except Exception as error:  # noqa: BLE001 - safetensors has no common class of its errors
        reason = getattr(error, "strerror", None) or one_line(error)
        _refuse(path, f"cannot be read ({reason})", error)


def _number(path: str, metadata: Mapping[str, str], name: str) -> int:
    text = metadata.get(name, "")
    plain = text.isascii() and text.isdigit() and len(text) <= len(str(_MOST_NUMBER))
    if not plain or not 1 <= int(text) <= _MOST_NUMBER:
        _refuse(path, f"{name} = {text!r:.40} in its metadata; allowed are whole numbers from 1 to {_MOST_NUMBER}")
    return int(text)


def _refuse(path: str, reason: str, cause: BaseException | None = None) -> NoReturn:
    message = f"trace {path!r:.200}: {reason}"
    raise InvalidCase(message) from cause
