"""Resolution of a case from layers, of which the first that has a key wins.

Flags, case file, production environment, profile, model preset, defaults, in this order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec

from distbench.case.atom_folder import folder_digest
from distbench.case.caller_fit import check_caller_fits
from distbench.case.file_digests import routing_digest, table_digest, wheel_digest
from distbench.case.identity import case_values
from distbench.case.injection import parse_inject
from distbench.case.limits import parse_limit
from distbench.case.placement import check_placement, normal_keys
from distbench.case.plugins import KINDS, OPTION_KEYS, canonical_options, check_name, is_trusted, parse_options
from distbench.case.presets import ALIASES, CUSTOM, DIMENSIONS, PRESETS, is_config_path, preset_name
from distbench.case.profiles import MOST_TOKENS, NO_PROFILE, PROFILES, caller_of
from distbench.case.spec import DERIVED_KEYS, FIELD_DEFAULTS, FIELD_TYPES, Case, names_code
from distbench.case.table_file import read_table_file, refuse_bulk
from distbench.case.timeouts import parse_stage_timeouts
from distbench.case.tokens import split_tokens, spread_tokens
from distbench.errors import InvalidCase, Unsupported
from distbench.utils.amd_arch import arch_of, fp8_format
from distbench.utils.devices import architecture
from distbench.utils.text import closest, counted, in_words, one_line, shown

FLAGS = "flag"
_DEFAULT = "default"
_UNTIL_FAILURE = 10_000


class Layer(msgspec.Struct, frozen=True):
    """Values from one source. `strict` layers are typed (files); the others hold text (flags, environment).

    `unsupported` is the reason why distbench cannot run the layer's selection: it is raised where one of its values
    would be used, or where it has none. A layer does not apply to a case whose value for a key is the one in `unless`.
    """

    source: str
    values: Mapping[str, Any]
    strict: bool = True
    unsupported: str = ""
    unless: Mapping[str, Any] = {}


class Resolved(msgspec.Struct, frozen=True):
    """A case, for every key the source of its value, and what its profile names and the case does not run."""

    case: Case
    sources: dict[str, str]
    notes: tuple[str, ...] = ()


def resolve_case(layers: Iterable[Layer], ep_size: int | None, *, fit: bool = True) -> Resolved:
    """Merge `layers`, the strongest first, with profile, preset and defaults into a checked case.

    `ep_size` is the number of ranks that run, or None to take it from the layers (8 where they have none). Without
    `fit`, values that do not fit together pass, for check_fit to find.

    Raises:
        InvalidCase: an unknown key, a bad value, or values that do not fit together.
        Unsupported: the environment selects a feature that distbench does not run.

    """
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    given = _with_model(layers)
    profile = _profile(given)
    defaults = FIELD_DEFAULTS | dict(profile.values)
    for layer in (*given, profile):
        _apply_layer(layer, values, sources, defaults)
    _apply_ranks(values, sources, ep_size)
    _apply_preset(values, sources)
    if values.get("recv_bound") and "limit" not in values:
        values["limit"], sources["limit"] = "off", sources["recv_bound"]
    if values.get("until_failure") and "repeats" not in values:
        values["repeats"], sources["repeats"] = _UNTIL_FAILURE, sources["until_failure"]
    for key, default in FIELD_DEFAULTS.items():
        if key not in values:
            values[key], sources[key] = default, _DEFAULT
    if sources["fp8_format"] == _DEFAULT:
        values["fp8_format"], sources["fp8_format"] = fp8_format(_architecture(values)), "device"
    _normalise(values, sources)
    _derive(profile, values, sources)
    case = Case(**values)
    note = ""
    if case.profile != NO_PROFILE and sources["caller"] == _DEFAULT:
        case, note = _with_caller(case, by_flag=sources["profile"] == FLAGS)
        sources["caller"] = _DEFAULT if note else profile.source
    if fit:
        check_fit(case)
    notes = (f"profile {case.profile}: {note}",) if note else ()
    return Resolved(case, {key: sources[key] for key in case_values(case) if key in sources}, notes)


def asked_value(key: str, layers: Iterable[Layer]) -> Any:
    """The value of `key` in the first of `layers` that has it, as it stands there; None for none."""
    return next((layer.values[key] for layer in layers if key in layer.values), None)


def load_case_file(path: str) -> Layer:
    """Read a TOML or JSON case file (by its suffix) into a layer.

    Raises:
        InvalidCase: unreadable, neither .toml nor .json, not valid TOML or JSON, or not a table.

    """
    try:
        content = read_table_file(path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        message = f"case file {path}: cannot be read ({reason}); give a readable .toml or .json file"
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


_GRAPHS = {"experts": True, "true": True, "false": False}
"""Other words for values of the key graph."""


def typed_value(key: str, raw: Any, layer: Layer) -> Any:
    """`raw` converted to the type of the case key `key`; tokens may still end in "...".

    Raises:
        InvalidCase: an unknown key, or an invalid value.

    """
    if key not in FIELD_TYPES:
        near = closest(str(key), FIELD_TYPES)
        message = f"{layer.source}: unknown key {key!r:.80}{near}; allowed are {', '.join(FIELD_TYPES)}"
        raise InvalidCase(message)
    value, repeat = split_tokens(raw) if key == "tokens" else (raw, ())
    value = _GRAPHS.get(str(value).lower(), value) if key == "graph" else value
    try:
        typed = msgspec.convert(value, FIELD_TYPES[key], strict=layer.strict)
    except (msgspec.ValidationError, ValueError, OverflowError) as error:
        words = ("experts", "layer") if key == "graph" else get_args(get_args(FIELD_TYPES[key])[0])
        allowed = words if "enum" in str(error) else ()
        reason = f"allowed are {', '.join(allowed)}" if allowed else in_words(one_line(error))
        message = f"{name_of(key, layer)} = {shown(raw)}: {reason}"
        raise InvalidCase(message) from error
    if key in KINDS:
        try:
            check_name(key, typed)
        except InvalidCase as error:
            message = f"{name_of(key, layer)} = {error}"
            raise InvalidCase(message) from error
    return (*typed, *repeat) if repeat else typed


def name_of(key: str, layer: Layer) -> str:
    """A key as its layer writes it: a flag, or the source and the key."""
    return f"--{key.replace('_', '-')}" if layer.source == FLAGS else f"{layer.source}: {key}"


def _with_model(layers: Iterable[Layer]) -> list[Layer]:
    """The layers, with a preset's alias as its name, and the config.json that names the model as a layer of its own."""
    given = list(layers)
    for index, layer in enumerate(given):
        name = layer.values.get("model")
        if name is None:
            continue
        if isinstance(name, str) and is_config_path(name):
            from distbench.case.model_config import config_values  # noqa: PLC0415 - most cases name a preset

            rest = {key: value for key, value in layer.values.items() if key != "model"}
            config = Layer(f"config:{name}", config_values(name))
            given[index : index + 1] = [msgspec.structs.replace(layer, values=rest), config]
        elif isinstance(name, str) and (known := preset_name(name)):
            given[index] = msgspec.structs.replace(layer, values={**layer.values, "model": known})
        break
    return given


def _profile(layers: Sequence[Layer]) -> Layer:
    """Layer of the profile that `layers` name, of no values where they name none or one that does not exist."""
    known = PROFILES.get(str(asked_value("profile", layers)))
    values = {key: one.value for key, one in known.values.items() if one.value != MOST_TOKENS} if known else {}
    return Layer(f"profile:{asked_value('profile', layers)}", values)


def _derive(profile: Layer, values: dict[str, Any], sources: dict[str, str]) -> None:
    """Set the keys that the profile derives from the tokens, where nothing else sets them."""
    known = PROFILES.get(values["profile"])
    for key, one in known.values.items() if known else ():
        if one.value == MOST_TOKENS and sources[key] == _DEFAULT:
            values[key], sources[key] = max(values["tokens"], default=0), profile.source


def _with_caller(case: Case, *, by_flag: bool) -> tuple[Case, str]:
    """The case with its profile's caller, or as it is with the reason why that caller does not run."""
    caller, note = caller_of(case.profile, msgspec.structs.asdict(case), by_flag=by_flag)
    if not caller:
        return case, note
    others = ("caller_wheel", "caller_wheel_sha256") if caller == "atom" else ("caller_folder", "caller_folder_sha256")
    changed = msgspec.structs.replace(case, caller=caller, **dict.fromkeys(others, ""))
    try:
        check_caller_fits(changed)
    except InvalidCase as error:
        return case, f"its own code does not run: {error}"
    return changed, ""


def _apply_layer(layer: Layer, values: dict[str, Any], sources: dict[str, str], defaults: Mapping[str, Any]) -> None:
    """Add the keys that no stronger layer has; `defaults` stand for keys that no layer so far has."""
    if any(values.get(key, defaults.get(key)) == value for key, value in layer.unless.items()):
        return
    _refuse_flag_keys(layer, values)
    fresh = (key for key in layer.values if key not in (*values, *DERIVED_KEYS))
    taken = [key for key in fresh if not _is_of_another(key, layer, values)]
    if layer.unsupported and (taken or not layer.values):
        raise Unsupported(layer.unsupported)
    for key in taken:
        values[key] = typed_value(key, layer.values[key], layer)
        sources[key] = layer.source


def _is_of_another(key: str, layer: Layer, values: Mapping[str, Any]) -> bool:
    """Whether a layer's options are those of a plugin that a stronger layer replaces."""
    part = OPTION_KEYS.get(key)
    return part is not None and part in values and values[part] != layer.values.get(part, values[part])


def _refuse_flag_keys(layer: Layer, values: Mapping[str, Any]) -> None:
    """Refuse code to execute that a file names, and no flag."""
    for key, named in layer.values.items():
        if layer.source != FLAGS and key not in values and names_code(key, named):
            flag = f"--{key.replace('_', '-')}"
            message = f"{layer.source}: {key} = {shown(named)} names code to execute; give {flag} too, or drop the key"
            raise InvalidCase(message)


def _apply_ranks(values: dict[str, Any], sources: dict[str, str], ep_size: int | None) -> None:
    if ep_size is None:
        values.setdefault("ep_size", 8)
        sources.setdefault("ep_size", _DEFAULT)
    elif values.get("ep_size", ep_size) == ep_size:
        values["ep_size"] = typed_value("ep_size", ep_size, Layer("launcher", {}))
        sources.setdefault("ep_size", "launcher")
    else:
        message = (
            f"ep_size = {values['ep_size']} ({sources['ep_size']}): the launch has {counted(ep_size, 'rank')}; "
            "start as many ranks or drop the key"
        )
        raise InvalidCase(message)


def _apply_preset(values: dict[str, Any], sources: dict[str, str]) -> None:
    name = values.get("model", FIELD_DEFAULTS["model"])
    if name == CUSTOM:
        _require_dimensions(values)
        return
    shape = PRESETS.get(name)
    if shape is None:
        near = closest(str(name), (*PRESETS, *ALIASES))
        message = (
            f"model = {name!r:.80}{near}: allowed are {', '.join(PRESETS)}, the path of a model's config.json, "
            f"or {CUSTOM} with all dimensions given"
        )
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
    overridden = [key for key, value in preset.items() if values[key] != value]
    if overridden:
        values["model"], sources["model"] = CUSTOM, f"preset:{name} with another {', '.join(overridden)}"


def _require_dimensions(values: Mapping[str, Any]) -> None:
    missing = [key for key in DIMENSIONS if key not in values]
    if missing:
        message = f"model = {CUSTOM}: {', '.join(missing)} not given; give all of {', '.join(DIMENSIONS)}, or a preset"
        raise InvalidCase(message)


def _architecture(values: dict[str, Any]) -> str:
    """Architecture of the device that the stand-ins imitate, or of this node's device where the case may use it."""
    if values["emulate"]:
        return arch_of(values["cu_count"])
    return "" if values["device"] == "cpu" else architecture()


def _normalise(values: dict[str, Any], sources: Mapping[str, str]) -> None:
    values["tokens"] = spread_tokens(values["tokens"], values["ep_size"])
    values["limit"] = parse_limit(values["limit"])
    values["timeout"] = float(values["timeout"])
    values["jitter"] = float(values["jitter"])
    for key in ("swiglu_limit", "dropped_slots", "dropped_tokens"):
        values[key] = float(values[key])
    numbers = (values[key] for key in ("num_experts", "physical_experts", "placement"))
    values["physical_experts"], values["placement"] = normal_keys(*numbers)
    for key in OPTION_KEYS:
        values[key] = canonical_options(key, values[key])
    values["routing_sha256"] = routing_digest(values["routing"])
    values["kernel_table_sha256"] = table_digest(values["kernel_table"], sources["kernel_table"])
    values["caller_wheel_sha256"] = wheel_digest(values["caller_wheel"])
    values["caller_folder_sha256"] = folder_digest(values["caller_folder"])


def check_fit(case: Case) -> None:
    """Refuse values that do not fit together.

    Raises:
        InvalidCase: names them, and a value that would fit.

    """
    parse_stage_timeouts(case.stage_timeouts)
    parse_inject(case.inject)
    if len(case.tokens) != case.ep_size:
        found = f"{counted(len(case.tokens), 'number')} for {counted(case.ep_size, 'rank')}"
        message = f"tokens: {found}; give one number, or one for each rank"
        raise InvalidCase(message)
    check_placement(case.num_experts, case.ep_size, case.physical_experts, case.placement)
    if case.topk > case.num_experts:
        message = f"topk = {case.topk}: above num_experts = {case.num_experts}; a token takes distinct experts"
        raise InvalidCase(message)
    for name in ("hidden", "intermediate"):
        size, pad = getattr(case, f"{name}_size"), getattr(case, f"{name}_pad")
        if pad >= size:
            message = f"{name}_pad = {pad}: {name}_size counts it and is {size}; use at most {size - 1}"
            raise InvalidCase(message)
    if case.dispatch_dtype == "fp8" and case.hidden_size % 128:
        message = f"hidden_size = {case.hidden_size}: fp8 dispatch scales blocks of 128 columns; use a multiple of 128"
        raise InvalidCase(message)
    if case.transport != "mori" and case.combine_quant != "none":
        message = (
            f"combine_quant = {case.combine_quant}: transport {case.transport} returns expert rows as they are; "
            "use transport mori, or combine_quant none"
        )
        raise InvalidCase(message)
    for key, part in OPTION_KEYS.items():
        _check_options(case, key, part)
    check_caller_fits(case)


def _check_options(case: Case, key: str, part: str) -> None:
    """Refuse options of distbench's own parts, which have none; those of others are checked by their ranks."""
    name, given = getattr(case, part), getattr(case, key)
    if parse_options(key, given) and is_trusted(part, name):
        message = f"{key} = {given:.80}: {part} {name} has no options; drop it, or name the plugin that takes it"
        raise InvalidCase(message)
