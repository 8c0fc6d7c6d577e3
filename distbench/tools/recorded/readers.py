"""Readers of recorded experts: SGLang's recorder, arrays of numpy and safetensors, CSV, Megatron's and vLLM's JSON.

Each yields parts: experts of some tokens of one rank in a step and layer. A rank of ALL_RANKS means all tokens of the
step, which are shared evenly over the ranks in their order.
"""

from __future__ import annotations

import base64
import csv
import io
import os
import warnings
import zipfile
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec
import numpy as np
from numpy.typing import NDArray

from distbench.case.table_file import open_regular
from distbench.errors import InvalidCase, Unsupported
from distbench.utils.text import counted, one_line, shown, why
from distbench.workload.trace_file import MOST_IDS

ALL_RANKS = -1
MTP_LAYERS, MTP_STRIDE = 1_000_000, 1_000
"""Numbers of Megatron's layers of multi-token prediction begin here, with as many for each head."""
SUFFIXES = (".pt", ".npy", ".safetensors", ".csv", ".jsonl")
_MOST_BYTES = 4 << 30
_MOST_LINE = 16 << 20
_LINES_AT_ONCE = 4096
_PLACE = ("step", "layer", "rank")
_DIMENSIONS = 4
_UNREADABLE = (
    *(OSError, ValueError, TypeError, LookupError, OverflowError, EOFError, RuntimeError, MemoryError),
    csv.Error,
)
"""Errors of readers on hostile files; torch and numpy have RuntimeError and MemoryError for sizes that do not fit."""
_MODE = "record with --expert-distribution-recorder-mode per_token"


class Part(NamedTuple):
    """Experts int64 [n, k] of tokens; -1 pads. Weights [n, k] where the file has them."""

    step: int
    layer: int
    rank: int
    ids: NDArray[np.int64]
    weights: NDArray[np.float64] | None = None


def read_parts(path: str) -> Iterator[Part]:
    """Parts of a file, by its suffix.

    Raises:
        InvalidCase: it cannot be read, or has another layout.
        Unsupported: torch is missing, which reads .pt.

    """
    readers = {".pt": _sglang, ".npy": _numpy, ".safetensors": _safetensors, ".csv": _csv, ".jsonl": _jsonl}
    reader = readers.get(Path(path).suffix)
    if reader is None:
        _refuse(path, f"suffix {Path(path).suffix!r}; known are {', '.join(SUFFIXES)}")
    try:
        descriptor = open_regular(path)
        size = os.fstat(descriptor).st_size
        os.close(descriptor)
        if size > _MOST_BYTES:
            _refuse(path, f"more than {_MOST_BYTES >> 30} GiB; give a part of it")
        yield from reader(path)
    except _UNREADABLE as error:
        _refuse(path, f"cannot be read ({why(error)})", error)


def load_tensors(path: str) -> Any:
    """Content of a .pt file as weights only: no code of it runs.

    Raises:
        InvalidCase: it has other objects than tensors and plain values.
        Unsupported: there is no torch.

    """
    import pickle  # noqa: PLC0415 - for the class of an error: nothing is unpickled but tensors
    import struct  # noqa: PLC0415 - likewise

    try:
        import torch  # noqa: PLC0415 - the other formats need none
    except ModuleNotFoundError as error:
        message = f"{path}: torch reads .pt files: {error}; run make setup"
        raise Unsupported(message) from error
    try:
        _check_unpacked(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of pickles that it refuses anyway
            return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, AttributeError, struct.error, zipfile.BadZipFile) as error:
        _refuse(path, "not a file of tensors and plain values alone; other objects are never loaded", error)


def _check_unpacked(path: str) -> None:
    """Refuse an archive that unpacks to more than a recording may have: torch holds all of it."""
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        size = sum(one.file_size for one in archive.infolist())
    if size > _MOST_BYTES:
        _refuse(path, f"unpacks to {size} bytes, allowed are {_MOST_BYTES}; give a part of it")


def _sglang(path: str) -> Iterator[Part]:
    """SGLang's expert-distribution recorder in mode per_token: one file a rank."""
    dump = load_tensors(path)
    records = dump.get("records") if isinstance(dump, dict) else None
    if not isinstance(records, list):
        _refuse(path, f"no records; {_MODE}")
    for record in records:
        ids = record.get("topk_ids_of_layer") if isinstance(record, dict) else None
        if ids is None or getattr(ids, "ndim", 0) != _DIMENSIONS - 1:
            _refuse(path, f"a record without topk_ids_of_layer; {_MODE}")
        if ids.numel() > MOST_IDS:  # a tensor may repeat one number without room for it
            _refuse(path, f"a record of {counted(ids.numel(), 'expert')}, allowed are {MOST_IDS}; give a part of it")
        found = ids.long().numpy()
        used = (found != -1).any(axis=(0, 1))  # the recorder has room for 8 experts of a token
        for layer, one in enumerate(found):
            yield Part(int(record["forward_pass_id"]), layer, int(record["rank"]), one[:, used])


def _numpy(path: str) -> Iterator[Part]:
    loaded = np.load(path, allow_pickle=False)
    if not isinstance(loaded, np.ndarray):
        _refuse(path, "an archive of arrays; give one array, as numpy.save writes it")
    yield from _array(path, loaded)


def _safetensors(path: str) -> Iterator[Part]:
    from safetensors import SafetensorError  # noqa: PLC0415
    from safetensors.numpy import load_file  # noqa: PLC0415

    try:
        tensors = load_file(path)
    except SafetensorError as error:
        _refuse(path, f"cannot be read ({one_line(error)})", error)
    if "ids" not in tensors:
        _refuse(path, f"no tensor ids, but {', '.join(sorted(tensors)[:4]) or 'none'}")
    yield from _array(path, tensors["ids"], tensors.get("weights"))


def _array(path: str, ids: NDArray[Any], weights: NDArray[Any] | None = None) -> Iterator[Part]:
    """Experts [n, k], of layers [L, n, k], or of steps and layers [T, L, n, k], and weights of the same shape."""
    if ids.dtype.kind not in "iu" or not 2 <= ids.ndim <= _DIMENSIONS:  # noqa: PLR2004
        _refuse(
            path,
            f"an array {ids.dtype} {shown(ids.shape)}; allowed are whole numbers, [n, k] to [T, L, n, k]",
        )
    if weights is not None and (weights.dtype.kind != "f" or weights.shape != ids.shape):
        _refuse(path, f"weights {weights.dtype} {shown(weights.shape)}; allowed are floats of the shape of ids")
    shape = (1,) * (_DIMENSIONS - ids.ndim) + ids.shape
    whole, shares = ids.reshape(shape), None if weights is None else weights.reshape(shape)
    for step, layer in np.ndindex(shape[:2]):
        one = None if shares is None else shares[step, layer].astype(np.float64)
        yield Part(step, layer, ALL_RANKS, whole[step, layer].astype(np.int64), one)


def _csv(path: str) -> Iterator[Part]:
    """A line a token: columns step, layer and rank, and one for each of its experts, in any number."""
    with Path(path).open(newline="", encoding="utf-8-sig") as stream:
        rows = csv.reader(stream)
        head = [name.strip().lower() for name in next(rows, [])]
        missing = [name for name in _PLACE if name not in head]
        places = [index for index, name in enumerate(head) if name not in _PLACE]
        if missing or not places:
            _refuse(path, f"no column {', '.join(missing) or 'of experts'}; give step, layer, rank, and one an expert")
        where = [head.index(name) for name in _PLACE]
        numbers = ([int(row[place]) for place in (*where, *places)] for row in _full(path, rows, len(head)))
        for (step, layer, rank), lines in groupby(numbers, key=lambda line: line[:3]):
            _refuse_rank(path, rank)
            while some := list(islice(lines, _LINES_AT_ONCE)):
                yield Part(step, layer, rank, np.array([line[3:] for line in some]))


def _full(path: str, rows: Any, columns: int) -> Iterator[list[str]]:
    """The lines of a csv.reader that are not empty; one with other columns than the first is refused."""
    for row in rows:
        if len(row) not in (0, columns):
            _refuse(path, f"line {rows.line_num}: {counted(len(row), 'column')}, the first line has {columns}")
        if row:
            yield row


def _jsonl(path: str) -> Iterator[Part]:
    """A line a part: distbench's own, Megatron's, or a response of vLLM's server."""
    responses = 0
    with Path(path).open("rb") as stream:
        while line := stream.readline(_MOST_LINE):
            if len(line) == _MOST_LINE:
                _refuse(path, f"a line of more than {_MOST_LINE >> 20} MiB; give a part of its tokens a line")
            if not line.strip():
                continue
            one = msgspec.json.decode(line, type=dict[str, Any])
            if "choices" in one:
                yield from _vllm(path, responses, one)
                responses += 1
            elif part := _line(path, one):
                yield part


def _line(path: str, one: dict[str, Any]) -> Part | None:
    """A line of experts, distbench's own or Megatron's (`top_indices`); None for a rank without tokens.

    Source: `RouterTracer` of megatron/core/transformer/moe/router_trace.py, Megatron-LM d98e8a64d (2026-08-22): a file
    a rank, layers counted in their block, `decoder` or `mtp`, of which the second has `mtp_idx`.
    """
    name = "top_indices" if "top_indices" in one else "ids"
    if one[name] == []:
        return None
    ids = np.array(one[name])
    if ids.ndim != 2 or ids.dtype.kind not in "iu":  # noqa: PLR2004
        _refuse(path, f"{name} = {shown(one[name])}: give a list of the experts of each token")
    step, layer, rank = (msgspec.convert(one[place], int) for place in _PLACE)
    if one.get("block", "decoder") != "decoder":
        layer += MTP_LAYERS + MTP_STRIDE * msgspec.convert(one["mtp_idx"], int)
    _refuse_rank(path, rank)
    return Part(step, layer, rank, ids, np.array(one["weights"], dtype=np.float64) if "weights" in one else None)


def _vllm(path: str, number: int, response: dict[str, Any]) -> Iterator[Part]:
    """A response of vLLM's server with `--enable-return-routed-experts`, as a step of its own.

    Source: `numpy2base64` of vllm/utils/serial_utils.py and `RoutedExpertsCapturer`, vLLM 0.33.0: an array [tokens,
    layers, k] of each choice as base64 of its .npy file. Layers without experts are left as 0.
    """
    found = [_array_of_choice(path, one) for one in msgspec.convert(response["choices"], list[dict[str, Any]])]
    if len({one.shape[1:] for one in found}) > 1:
        _refuse(path, f"response {number}: its choices have other layers or top-k")
    for layer, ids in enumerate(np.concatenate(found).transpose(1, 0, 2) if found else ()):
        if ids.any() or ids.shape[1] == 1:
            yield Part(number, layer, ALL_RANKS, ids)


def _array_of_choice(path: str, choice: dict[str, Any]) -> NDArray[np.int64]:
    encoded = choice.get("routed_experts")
    if not isinstance(encoded, str):
        _refuse(path, "a choice without routed_experts; start vLLM with --enable-return-routed-experts")
    found = np.load(io.BytesIO(base64.b64decode(encoded, validate=True)), allow_pickle=False)
    if found.dtype.kind not in "iu" or found.ndim != _DIMENSIONS - 1:
        _refuse(path, f"routed_experts {found.dtype} {shown(found.shape)}; vLLM's are [tokens, layers, k]")
    return np.asarray(found, dtype=np.int64)


def _refuse_rank(path: str, rank: int) -> None:
    """Refuse a rank below 0, which would mean all of them."""
    if rank < 0:
        _refuse(path, f"rank {rank}; allowed are whole numbers from 0 up")


def _refuse(path: str, reason: str, cause: BaseException | None = None) -> NoReturn:
    message = f"trace {path!r:.200}: {reason}"
    raise InvalidCase(message) from cause
