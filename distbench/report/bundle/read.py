"""Reading of bundles from untrusted sources: no file name is taken from a bundle, and every value is checked."""

from __future__ import annotations

import hashlib
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import msgspec

from distbench.case.kinds import inputs_of
from distbench.case.limits import Traffic
from distbench.case.resolve import Layer, resolve_case
from distbench.case.spec import UNSTORED_KEYS, Case
from distbench.case.stages import ARMS, LAYER_STAGES, Arm
from distbench.case.trace_name import TraceName, trace_name
from distbench.errors import InvalidCase
from distbench.report.bundle.layout import (
    KERNEL_TABLE,
    MANIFEST,
    MAX_HEADER_BYTES,
    MAX_JSON_BYTES,
    MAX_PART_BYTES,
    MAX_TABLE_BYTES,
    MAX_TOKENS,
    MAX_TRACE_BYTES,
    REPORT,
    SCHEMA,
    TRACE,
    Manifest,
    Part,
    names_token,
    part_name,
)
from distbench.report.schema import Report
from distbench.utils.text import one_line, shown
from distbench.verify.records import Divergence, Gathered

_MAX_EXPERTS = 1 << 16
_MAX_COLUMNS = 1 << 18
_LENGTH_BYTES = 8
# safetensors before 0.8 has no name for e4m3fnuz: it is written as bytes.
_FP8 = {"e4m3fn": "F8_E4M3", "e4m3fnuz": "U8"}
_BLOCK = 128


class Bundle(NamedTuple):
    """A bundle whose JSON has been read and is consistent; parts are read one at a time."""

    folder: Path
    manifest: Manifest
    report: Report


class PartContent(NamedTuple):
    """Bytes of a part whose header has been checked, and the digests that it carries."""

    content: bytes
    digests: dict[str, str]


def open_bundle(folder: str | Path) -> Bundle:
    """Read manifest and report.

    Raises:
        InvalidCase: a file is missing, too large, not a regular file, not of this schema, or inconsistent with others.

    """
    folder = Path(folder)
    manifest: Manifest = _decoded(folder, MANIFEST, Manifest)
    if manifest.schema != SCHEMA:
        _refuse(folder, MANIFEST, f"schema {shown(manifest.schema)}, known is {SCHEMA}")
    report: Report = _decoded(folder, REPORT, Report)
    if report.inputs_version != manifest.inputs_version:
        _refuse(
            folder, MANIFEST, f"inputs of version {manifest.inputs_version}, the report has {report.inputs_version}"
        )
    _check_case(folder, manifest.case)
    _check_recorded(folder, manifest)
    return Bundle(folder, manifest, report)


def runnable_case(bundle: Bundle, asked: Sequence[Layer] = ()) -> Case:
    """The bundle's case with the `asked` keys in front, checked as if it came from a case file.

    Its kernel table and its recorded routing are the bundle's own copies, never the paths that the case names, unless
    others are requested.

    Raises:
        InvalidCase: the case is invalid, or its kernel table is not in the bundle.

    """
    case = local_case(bundle)
    values = {key: value for key, value in msgspec.structs.asdict(case).items() if key not in UNSTORED_KEYS}
    values["kernel_table"] = str(bundle.folder / KERNEL_TABLE) if case.kernel_table else ""
    if case.kernel_table and not any("kernel_table" in layer.values for layer in asked):
        if bundle.manifest.table_left_out:
            message = f"bundle {bundle.folder}: its kernel table was too large to be copied; give --kernel-table FILE"
            raise InvalidCase(message)
        table = read_bounded(bundle.folder, KERNEL_TABLE, MAX_TABLE_BYTES)
        if hashlib.sha256(table).hexdigest() != case.kernel_table_sha256:
            _refuse(bundle.folder, KERNEL_TABLE, "is not the table that the case ran with")
    return resolve_case([*asked, Layer(f"bundle:{bundle.folder}", values)], None).case


def local_case(bundle: Bundle) -> Case:
    """The bundle's case, with the bundle's own copy of a recorded routing.

    Raises:
        InvalidCase: the copy is missing or damaged.

    """
    case = bundle.manifest.case
    if not (trace_name(case.routing) and bundle.manifest.trace_sha256):
        return case
    content = read_bounded(bundle.folder, TRACE, MAX_TRACE_BYTES)
    if hashlib.sha256(content).hexdigest() != bundle.manifest.trace_sha256:
        _refuse(bundle.folder, TRACE, "has another SHA-256 than the manifest says")
    return msgspec.structs.replace(case, routing=str(TraceName(str(bundle.folder / TRACE))))


def read_part(bundle: Bundle, part: Part) -> PartContent:
    """A rank's part, its header checked name by name against the case.

    Raises:
        InvalidCase: missing, changed, not safetensors, or a tensor of another name, dtype or width.

    """
    name = part_name(part.rank)
    if part.missing:
        _refuse(bundle.folder, name, part.missing)
    content = read_bounded(bundle.folder, name, MAX_PART_BYTES)
    if len(content) != part.size:
        _refuse(bundle.folder, name, f"has {len(content)} bytes, the manifest says {part.size}")
    if hashlib.sha256(content).hexdigest() != part.sha256:
        _refuse(bundle.folder, name, "has another SHA-256 than the manifest says")
    try:
        return PartContent(content, _check_header(content, bundle.manifest.case))
    except (ValueError, RecursionError) as error:
        _refuse(bundle.folder, name, one_line(error))


def read_bounded(folder: Path, name: str, most: int) -> bytes:
    """Bytes of a regular file; links are not followed.

    Raises:
        InvalidCase: missing, a link, not a regular file, or more than `most` bytes.

    """
    try:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        _refuse(folder, name, f"cannot be read ({getattr(error, 'strerror', None) or error})")
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        _refuse(folder, name, "is not a regular file")
    with os.fdopen(descriptor, "rb") as file:
        if found.st_size > most:
            _refuse(folder, name, f"has {found.st_size} bytes, at most {most} are read")
        return file.read(most)


def _decoded(folder: Path, name: str, kind: Any) -> Any:
    content = read_bounded(folder, name, MAX_JSON_BYTES)
    try:
        return msgspec.json.decode(content, type=kind)
    except (ValueError, RecursionError) as error:
        _refuse(folder, name, one_line(error))


def _check_case(folder: Path, case: Case) -> None:
    bounds = {
        "num_experts": _MAX_EXPERTS,
        "placed_experts": _MAX_EXPERTS,
        "topk": _MAX_EXPERTS,
        "hidden_size": _MAX_COLUMNS,
        "intermediate_size": _MAX_COLUMNS,
    }
    for key, bound in bounds.items():
        if getattr(case, key) > bound:
            _refuse(folder, MANIFEST, f"{key} = {getattr(case, key)}: bundles have at most {bound}")
    if len(case.tokens) != case.ep_size:
        _refuse(folder, MANIFEST, f"tokens: {len(case.tokens)} numbers for {case.ep_size} ranks")


def _check_recorded(folder: Path, manifest: Manifest) -> None:
    case, recorded, gathered = manifest.case, manifest.recorded, manifest.gathered
    ranks = list(range(case.ep_size))
    if [part.rank for part in recorded.parts] not in (ranks, []):
        _refuse(folder, MANIFEST, f"{len(recorded.parts)} parts are not one for each of {case.ep_size} ranks in order")
    if len(recorded.tokens) > MAX_TOKENS:
        _refuse(folder, MANIFEST, f"{len(recorded.tokens)} recorded tokens, at most {MAX_TOKENS} are written")
    _refuse_strangers(folder, case, recorded.tokens)
    if (gathered is None) != (manifest.traffic is None) or (gathered is None and recorded.tokens):
        _refuse(folder, MANIFEST, "recorded tokens, traffic and what rank 0 gathered belong together, some are missing")
    if recorded.inputs and recorded.inputs not in inputs_of(case):
        _refuse(folder, MANIFEST, f"recorded {recorded.inputs} inputs, the case runs with {case.numerics}")
    if gathered is not None and (gathered.gaussian is not None) != (case.numerics == "both"):
        _refuse(folder, MANIFEST, f"records do not fit a case that runs with numerics {case.numerics}")
    if gathered is not None and manifest.traffic is not None:
        for one in filter(None, (gathered, gathered.gaussian)):
            _check_gathered(folder, case, one, manifest.traffic)


def _check_gathered(folder: Path, case: Case, gathered: Gathered, traffic: Traffic) -> None:
    ranks = list(range(case.ep_size))
    if [record.rank for record in gathered.observations] != ranks or len(traffic.total_recv) != len(ranks):
        _refuse(folder, MANIFEST, f"records of {len(gathered.observations)} ranks for a case of {len(ranks)}")
    names = frozenset(map(str, ranks))
    for listed in gathered.differing.values():
        _refuse_strangers(folder, case, listed)
    for record in gathered.observations:
        _refuse_strangers(folder, case, record.lost.tokens)
        for found in record.divergences:
            _check_divergence(folder, case, record.rank, found, names)


def _check_divergence(folder: Path, case: Case, rank: int, found: Divergence, names: frozenset[str]) -> None:
    if found.arm not in ARMS or found.stage not in LAYER_STAGES:
        _refuse(folder, MANIFEST, f"no such arm or stage: {shown(found.arm)}, {shown(found.stage)}")
    named = [str(found.rank), *map(str, found.evidence.suspects), *found.evidence.by_destination]
    strange = [one for one in named if one not in names]
    if strange or found.rank != rank:
        _refuse(folder, MANIFEST, f"a divergence of rank {rank} names rank {shown((strange or named)[0])}")
    source = (found.source_rank, found.source_token)
    sources = [] if source == (None, None) else [source]
    _refuse_strangers(folder, case, [*sources, *found.evidence.tokens])


def _refuse_strangers(folder: Path, case: Case, tokens: Sequence[tuple[int | None, int | None]]) -> None:
    for rank, token in tokens:
        if rank is None or token is None or not names_token(case, (rank, token)):
            _refuse(folder, MANIFEST, f"token {shown(token)} of rank {shown(rank)}: the case has none such")


def _check_header(content: bytes, case: Case) -> dict[str, str]:
    length = int.from_bytes(content[:_LENGTH_BYTES], "little")
    if len(content) < _LENGTH_BYTES or length > min(len(content) - _LENGTH_BYTES, MAX_HEADER_BYTES):
        message = f"a header of {length} bytes; a part of {len(content)} has at most {MAX_HEADER_BYTES}"
        raise ValueError(message)
    header = json.loads(content[_LENGTH_BYTES : _LENGTH_BYTES + length], object_pairs_hook=_unique)
    if not isinstance(header, dict):
        message = "the header is no table"
        raise ValueError(message)  # noqa: TRY004 - of the file, not of an argument
    metadata = msgspec.convert(header.pop("__metadata__", {}), dict[str, str])
    allowed = tensor_kinds(case)
    for name, raw in header.items():
        described = msgspec.convert(raw, _TensorHeader)
        if name not in allowed:
            message = f"a tensor {shown(name)}, which no part has"
            raise ValueError(message)
        dtype, columns = allowed[name]
        wanted = [] if columns is None else [columns]
        if described.dtype != dtype or len(described.shape) != 1 + len(wanted) or described.shape[1:] != wanted:
            message = f"{name} is {shown(described.dtype)} {shown(described.shape)}, not {dtype} {['rows', *wanted]}"
            raise ValueError(message)
    return msgspec.json.decode(metadata.get("digests", "{}"), type=dict[str, str])


class _TensorHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: list[int]
    data_offsets: tuple[int, int]


def tensor_kinds(case: Case) -> dict[str, tuple[str, int | None]]:
    """Tensors that a part may hold: by name, the safetensors dtype, and columns (None: a vector)."""
    hidden, topk = case.hidden_size, case.topk_slots
    batch: dict[str, tuple[str, int | None]] = {
        "hidden": (_FP8[case.fp8_format] if case.dispatch_dtype == "fp8" else "BF16", hidden),
        "weights": ("F32", topk),
        "ids": ("I32", topk),
    }
    if case.dispatch_dtype == "fp8":
        batch["scales"] = ("F32", hidden // _BLOCK)
    kinds: dict[str, tuple[str, int | None]] = {
        "routing": ("I32", topk),
        "token.index": ("I64", None),
        "token.oracle": ("BF16", hidden),
    }
    kinds |= {f"token.{name}": kind for name, kind in batch.items()}
    for arm in Arm:
        kinds |= {f"{arm}.{name}": kind for name, kind in batch.items()}
        kinds |= {
            f"{arm}.sources": ("I64", 2),
            f"{arm}.slots": ("I64", None),
            f"{arm}.cut": ("I64", 3),
            f"{arm}.experts": ("BF16", hidden),
            f"{arm}.oracle": ("BF16", hidden),
            f"combined.{arm}": ("BF16", hidden),
        }
    return kinds


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        message = "a name stands twice in the header"
        raise ValueError(message)
    return found


def _refuse(folder: Path, name: str, reason: str) -> NoReturn:
    message = f"bundle {folder}: {name}: {reason}; give a folder as --bundle writes it, whole and unchanged"
    raise InvalidCase(message)
