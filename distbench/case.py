"""The case: everything that decides what one run does, frozen, validated and hashed.

A case is put together from layers, the first that has a key wins: flags, case file, production environment, model
preset, defaults. After `resolve_case` nothing is optional any more, and two ranks that hold the same `case_hash` hold
the same case.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_type_hints

import msgspec

from distbench.errors import InvalidCase
from distbench.limits import ALLOWED_LIMITS, parse_limit
from distbench.models import PRESETS
from distbench.values import refuse_bulk, shown, split_tokens, spread_tokens

STAND_INS = {"collective": "collective for mori", "reference": "reference for aiter"}

Count = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
TokenCount = Annotated[int, msgspec.Meta(ge=0, le=1 << 24)]
Rows = Annotated[int, msgspec.Meta(ge=0, le=1 << 40)]


def _help(text: str) -> msgspec.Meta:
    return msgspec.Meta(description=text)


class Case(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One test: a model layer, a routing, a limit and how it is judged. Field descriptions are the help texts."""

    model: Annotated[str, _help("preset of the MoE layer, see `distbench presets`")] = "qwen3-30b-a3b"
    hidden_size: Annotated[Count, _help("hidden columns H")]
    intermediate_size: Annotated[Count, _help("intermediate columns I of an expert")]
    num_experts: Annotated[Count, _help("routed experts E over all ranks")]
    topk: Annotated[Count, _help("experts k of a token")]
    ep_size: Annotated[Annotated[int, msgspec.Meta(ge=1, le=1 << 16)], _help("ranks W of the expert-parallel group")]
    tokens: Annotated[
        tuple[TokenCount, ...], _help("tokens of each rank: one number for all, or a list; 0,1,7,33,... repeats it")
    ] = (16,)
    routing: Annotated[str, _help("uniform, zipf:S, hot-rank:R, fan-in:R, local or duplicates")] = "uniform"
    limit: Annotated[str, _help(f"rows kept: {ALLOWED_LIMITS}")] = "sum32"
    recv_bound: Annotated[bool, _help("with the limit off, cut at the bound that newer SGLang derives")] = False
    policy: Annotated[
        Literal["strict", "unchecked", "guard"],
        _help("limit below total_recv: refuse on all ranks, cut as production does, or cut to total_recv"),
    ] = "strict"
    max_dispatch_tokens_per_rank: Annotated[Count, _help("M: tokens that a sender may hold")] = 4096
    prealloc_max_recv_tokens: Annotated[
        Rows, _help("P: 0 sizes the receive buffer W * M rows, else W * min(ceil(P / W), M)")
    ] = 0
    dispatch_dtype: Annotated[
        Literal["bf16", "fp8"], _help("payload type; fp8 is e4m3 with a scale per 128 columns")
    ] = "bf16"
    numerics: Annotated[Literal["exact", "gaussian"], _help("inputs: exact in any summation order, or realistic")] = (
        "exact"
    )
    require: Annotated[
        Literal["bitwise", "tolerance"], _help("what counts as equal where the numerics are not exact")
    ] = "bitwise"
    transport: Annotated[Literal["collective"], _help("what moves the rows")] = "collective"
    experts: Annotated[Literal["reference"], _help("what computes them")] = "reference"
    slot_order: Annotated[
        Literal["shuffled", "source"], _help("order of received rows: seeded shuffle (atomics) or by source")
    ] = "shuffled"
    kernel_table: Annotated[str, _help("CSV in aiter's tuned_fmoe format; empty: heuristics only")] = ""
    kernel_table_sha256: Annotated[str, _help("digest of the table's bytes, filled in when it is read")] = ""
    aiter_version: Annotated[str, _help("aiter release whose selection rules apply; empty: the newest known")] = ""
    cu_count: Annotated[
        Annotated[int, msgspec.Meta(ge=1, le=4096)], _help("compute units assumed by the heuristics")
    ] = 304
    seed: Annotated[Annotated[int, msgspec.Meta(ge=0, le=1 << 62)], _help("seed of inputs and shuffles")] = 0
    repeats: Annotated[Annotated[int, msgspec.Meta(ge=1, le=1_000_000)], _help("times that all arms run")] = 1
    gather: Annotated[
        Literal["auto", "rows", "digests"], _help("what rank 0 compares: rows, 128-bit digests, or by size")
    ] = "auto"
    timeout: Annotated[Annotated[float, msgspec.Meta(gt=0, le=86400)], _help("seconds any one stage may take")] = 300.0

    @property
    def experts_per_rank(self) -> int:
        """Local experts El; every rank holds the same number (MoRI's num_experts_per_rank)."""
        return self.num_experts // self.ep_size

    @property
    def stand_ins(self) -> list[str]:
        """What runs in the place of mori and aiter."""
        return [STAND_INS[name] for name in (self.transport, self.experts) if name in STAND_INS]

    @property
    def capacity(self) -> int:
        """R, rows of the receive buffer (MoRI: W * M, or W * min(ceil(P / W), M) where P is given)."""
        share = self.max_dispatch_tokens_per_rank
        if self.prealloc_max_recv_tokens:
            share = min(-(-self.prealloc_max_recv_tokens // self.ep_size), share)
        return self.ep_size * share


class Layer(msgspec.Struct, frozen=True):
    """Values from one place. `strict` layers are typed (files); the others hold text (flags, environment)."""

    source: str
    values: Mapping[str, Any]
    strict: bool = True


FLAGS = "flag"


class Resolved(msgspec.Struct, frozen=True):
    """A case and, for every key, the place its value came from."""

    case: Case
    sources: dict[str, str]


SHAPE_KEYS = ("hidden_size", "intermediate_size", "num_experts", "topk")
DERIVED_KEYS = ("kernel_table_sha256",)
FIELD_HINTS: dict[str, Any] = get_type_hints(Case, include_extras=True)
FIELD_TYPES: dict[str, Any] = FIELD_HINTS | {
    "tokens": TokenCount | tuple[TokenCount, ...],
    "limit": str | int,
}
FIELD_DEFAULTS: dict[str, Any] = {
    field.name: field.default for field in msgspec.structs.fields(Case) if not field.required
}


def resolve_case(layers: Iterable[Layer], ep_size: int | None) -> Resolved:
    """Merge `layers`, the strongest first, with preset and defaults into a checked case.

    `ep_size` is the number of ranks that run, or None to take it from the layers (8 where they have none).

    Raises:
        InvalidCase: an unknown key, a bad value, or values that do not fit each other.

    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for layer in layers:
        for key, raw in layer.values.items():
            if key not in values and key not in DERIVED_KEYS:
                values[key] = typed_value(key, raw, layer)
                sources[key] = layer.source
    _apply_ranks(values, sources, ep_size)
    _apply_preset(values, sources)
    if values.get("recv_bound") and "limit" not in values:
        values["limit"], sources["limit"] = "off", sources["recv_bound"]
    for key, default in FIELD_DEFAULTS.items():
        if key not in values:
            values[key], sources[key] = default, "default"
    _normalise(values)
    case = Case(**values)
    _check_fit(case)
    return Resolved(case, {key: sources[key] for key in FIELD_TYPES if key in sources})


def case_hash(case: Case) -> str:
    """SHA-256 over the case's canonical JSON, as 64 hex digits."""
    return hashlib.sha256(msgspec.json.encode(case, order="sorted")).hexdigest()


def load_case_file(path: str) -> Layer:
    """Read a TOML or JSON case file (by its suffix) into a layer.

    Raises:
        InvalidCase: unreadable, neither .toml nor .json, not valid TOML or JSON, or not a table.

    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        message = f"case file {path}: cannot be read ({error.strerror}); give a readable .toml or .json file"
        raise InvalidCase(message) from error
    return Layer(source=f"file:{path}", values=decode_table(path, content))


def decode_table(path: str, content: bytes) -> dict[str, Any]:
    """Decode the bytes of the .toml or .json file `path` into a table with text keys.

    Raises:
        InvalidCase: another suffix, broken TOML or JSON, or something other than a table.

    """
    decoders = {".json": msgspec.json.decode, ".toml": msgspec.toml.decode}
    decode = decoders.get(Path(path).suffix)
    if decode is None:
        message = f"file {path}: suffix {Path(path).suffix!r} is neither .toml nor .json; rename it to what it holds"
        raise InvalidCase(message)
    try:
        refuse_bulk(content)
        table = decode(content)
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        message = f"file {path}: not valid {Path(path).suffix[1:].upper()} ({one_line(error)})"
        raise InvalidCase(message) from error
    if not isinstance(table, dict):
        message = f"file {path}: holds a {type(table).__name__}, allowed is one table of case keys"
        raise InvalidCase(message)
    return table


def one_line(error: BaseException | str) -> str:
    """Return a message without its line breaks and outer blanks."""
    return " ".join(str(error).split())


def typed_value(key: str, raw: Any, layer: Layer) -> Any:
    """Return `raw` as the type of the case key `key`; tokens may still end in "...".

    Raises:
        InvalidCase: no such key, or not such a value.

    """
    if key not in FIELD_TYPES:
        message = f"{layer.source}: unknown key {key!r:.80}; allowed are {', '.join(FIELD_TYPES)}"
        raise InvalidCase(message)
    value, repeat = split_tokens(raw) if key == "tokens" else (raw, ())
    try:
        typed = msgspec.convert(value, FIELD_TYPES[key], strict=layer.strict)
    except (msgspec.ValidationError, ValueError, OverflowError) as error:
        allowed = get_args(get_args(FIELD_TYPES[key])[0]) if "enum" in str(error) else ()
        reason = f"allowed are {', '.join(allowed)}" if allowed else one_line(error)
        name = f"--{key.replace('_', '-')}" if layer.source == FLAGS else f"{layer.source}: {key}"
        message = f"{name} = {shown(raw)}: {reason}"
        raise InvalidCase(message) from error
    return (*typed, *repeat) if repeat else typed


def _apply_ranks(values: dict[str, Any], sources: dict[str, str], ep_size: int | None) -> None:
    if ep_size is None:
        values.setdefault("ep_size", 8)
        sources.setdefault("ep_size", "default")
    elif values.get("ep_size", ep_size) == ep_size:
        values["ep_size"] = typed_value("ep_size", ep_size, Layer("launcher", {}))
        sources.setdefault("ep_size", "launcher")
    else:
        message = (
            f"ep_size = {values['ep_size']} ({sources['ep_size']}): {ep_size} ranks were started; "
            "start as many ranks or drop the key"
        )
        raise InvalidCase(message)


def _apply_preset(values: dict[str, Any], sources: dict[str, str]) -> None:
    name = values.get("model", FIELD_DEFAULTS["model"])
    shape = PRESETS.get(name)
    if shape is None:
        message = f"model = {name!r:.80}: allowed are {', '.join(PRESETS)}"
        raise InvalidCase(message)
    preset = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_experts": shape.experts_for(values["ep_size"]),
        "topk": shape.topk,
    }
    for key, value in preset.items():
        if key not in values:
            values[key], sources[key] = value, f"preset:{name}"


def _normalise(values: dict[str, Any]) -> None:
    values["tokens"] = spread_tokens(values["tokens"], values["ep_size"])
    values["limit"] = parse_limit(values["limit"])
    values["timeout"] = float(values["timeout"])
    values["kernel_table_sha256"] = _table_digest(values["kernel_table"])


def _table_digest(path: str) -> str:
    if not path:
        return ""
    try:
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()
    except (OSError, ValueError) as error:
        message = f"kernel_table = {path!r:.200}: cannot be read ({one_line(error)}); give a readable CSV file"
        raise InvalidCase(message) from error


def _check_fit(case: Case) -> None:
    if len(case.tokens) != case.ep_size:
        message = (
            f"tokens: {len(case.tokens)} numbers for {case.ep_size} ranks; give one number or {case.ep_size} of them"
        )
        raise InvalidCase(message)
    if case.num_experts % case.ep_size:
        message = (
            f"num_experts = {case.num_experts}: not divisible by {case.ep_size} ranks; "
            f"use {case.num_experts // case.ep_size * case.ep_size or case.ep_size} experts or other ranks"
        )
        raise InvalidCase(message)
    if case.topk > case.num_experts:
        message = f"topk = {case.topk}: above num_experts = {case.num_experts}; a token takes distinct experts"
        raise InvalidCase(message)
    if case.dispatch_dtype == "fp8" and case.hidden_size % 128:
        message = f"hidden_size = {case.hidden_size}: fp8 dispatch scales blocks of 128 columns; use a multiple of 128"
        raise InvalidCase(message)
