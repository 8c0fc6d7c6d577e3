"""Parts of a case that packages can bring: their names, what they state, and their options. Loads no torch.

A name is a built-in one, that of an installed entry point, or `package.module:attribute`. Built-in parts are found,
loaded and asked in the same way. Only `load_plugin` imports anything of a package, and only ranks call it.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import msgspec

from distbench.errors import InvalidCase, Unsupported
from distbench.utils.text import closest, one_line, shown

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

Part = Literal["transport", "experts", "caller"]


class Kind(NamedTuple):
    """A part that can be brought: the group of its entry points, and its built-in names with their references.

    `guests` are built-in adapters over packages with an interface of their own, held to the contract as plugins are.
    """

    group: str
    built_in: Mapping[str, str]
    guests: tuple[str, ...] = ()


KINDS: dict[str, Kind] = {
    "transport": Kind(
        "distbench.transports",
        {
            "collective": "distbench.transport.collective.transport:PLUGIN",
            "symmetric": "distbench.transport.symmetric.transport:PLUGIN",
            "mori": "distbench.transport.mori.transport:PLUGIN",
            "deepep": "distbench.transport.deepep.transport:PLUGIN",
        },
        guests=("deepep",),
    ),
    "experts": Kind(
        "distbench.experts",
        {
            "reference": "distbench.experts.reference:PLUGIN",
            "triton": "distbench.experts.triton.adapter:PLUGIN",
            "aiter": "distbench.experts.aiter.adapter:PLUGIN",
            "torch-grouped": "distbench.experts.torch_grouped:PLUGIN",
            "vllm": "distbench.experts.vllm_modular:PLUGIN",
            "sglang-triton": "distbench.experts.sglang_triton:PLUGIN",
        },
        guests=("torch-grouped", "vllm", "sglang-triton"),
    ),
    "caller": Kind(
        "distbench.callers",
        {
            "own": "",  # no caller
            "sglang": "distbench.callers.sglang.caller:PLUGIN",
            "vllm": "distbench.callers.vllm.caller:PLUGIN",
            "atom": "distbench.callers.atom.caller:PLUGIN",
        },
    ),
}
"""Parts by their key of a case."""

FAULT = "fault"
_FAULTS = Kind("distbench.faults", {})
"""Faults, which the key inject names among its text; the built-in ones are in faults/injector.py."""

OPTION_KEYS: dict[str, Part] = {"transport_option": "transport", "experts_option": "experts"}
"""Keys with the options of a part."""

_REFERENCE = re.compile(r"[A-Za-z_]\w*(?:\.\w+)*:[A-Za-z_]\w*(?:\.\w+)*", re.ASCII)
_OPTION_NAME = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_LONGEST_NAME = 200


class NoOptions(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of a part that has none."""


class Plugin(msgspec.Struct, frozen=True, kw_only=True):
    """A transport, experts or a caller: how a rank makes them, and what they state about themselves.

    `make` takes a `TransportContext`, an `ExpertsContext` or a `CallerContext`. A case that needs what is not stated is
    UNSUPPORTED: `dtypes` are payloads of dispatch; without `zero_tokens` each rank needs a token, without
    `negative_ids` each slot an expert; `graphs` says that
    calls can be captured in a CUDA graph; `two_batch_overlap` that two transports may be under way at once. `options`
    declares the part's own options as fields with types and bounds (msgspec.Meta), each with a default unless it is
    required. Order of addition and roundings are stated by the part itself: `Transport.sum_order`, `Experts.roundings`.
    """

    make: Callable[[Any], Any]
    name: str = ""
    version: str = ""
    devices: tuple[Literal["cpu", "cuda"], ...] = ("cpu", "cuda")
    dtypes: tuple[Literal["bf16", "fp8"], ...] = ("bf16", "fp8")
    zero_tokens: bool = True
    negative_ids: bool = True
    graphs: bool = False
    two_batch_overlap: bool = False
    options: type[msgspec.Struct] = NoOptions

    def about(self) -> dict[str, str]:
        """What identifies the part, for the packages of a report."""
        return {"name": self.name, "version": self.version}


def is_built_in(part: str, name: str) -> bool:
    """Whether `name` is distbench's own."""
    return name in KINDS[part].built_in


def is_trusted(part: str, name: str) -> bool:
    """Whether `name` is built in and no guest: nothing is checked of it that costs a call."""
    kind = KINDS[part]
    return name in kind.built_in and name not in kind.guests


@lru_cache
def installed(part: str) -> dict[str, EntryPoint]:
    """Entry points of other packages, by name. Reads the metadata of all installed packages, and imports none."""
    from importlib.metadata import entry_points  # noqa: PLC0415 - built-in parts need none of it

    kind = _kind(part)
    return {one.name: one for one in entry_points(group=kind.group) if one.name not in kind.built_in}


def _kind(part: str) -> Kind:
    return _FAULTS if part == FAULT else KINDS[part]


def is_reference(name: str) -> bool:
    """Whether a name has the form `package.module:attribute`."""
    return len(name) <= _LONGEST_NAME and _REFERENCE.fullmatch(name) is not None


def check_name(part: str, name: str) -> None:
    """Refuse a name that is neither built in nor installed nor a reference; whether that leads anywhere is not seen.

    Raises:
        InvalidCase: lists the names that exist.
    """
    if is_built_in(part, name) or is_reference(name):
        return
    known = (*KINDS[part].built_in, *installed(part))
    if name not in known:
        allowed = f"allowed are {', '.join(known)}, or package.module:factory"
        raise InvalidCase(f"{shown(name)}{closest(name, known)}: {allowed}")  # noqa: EM102, TRY003 - its caller has the key


def reference_of(part: str, name: str) -> str:
    """Return `module:attribute` of a name that `check_name` has accepted."""
    built_in = _kind(part).built_in
    if name in built_in:
        return built_in[name]
    return name if ":" in name else installed(part)[name].value


def load_plugin(part: str, name: str) -> Plugin:
    """Import a part and return what it states; any other callable than a `Plugin` is one that states nothing.

    Raises:
        InvalidCase, Unsupported: as `load_object`; or it is no callable.
    """
    found = load_object(part, name)
    if isinstance(found, Plugin):
        return found if found.name else msgspec.structs.replace(found, name=name)
    if callable(found):
        return Plugin(make=found, name=name)
    message = f"{part} {name}: is a {type(found).__name__}; allowed are a distbench.plugins.Plugin and a callable"
    raise InvalidCase(message)


def load_object(part: str, name: str) -> Any:
    """Import what a name leads to. For a reference the working directory is on the path, behind all others.

    Raises:
        InvalidCase: no such module or attribute, or an error while it is imported.
        Unsupported: it needs a package that is missing.
    """
    module, _, attribute = reference_of(part, name).partition(":")
    if ":" in name and str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))
    try:
        found: Any = import_module(module)
    except (InvalidCase, Unsupported) as error:
        message = f"{part} {name}: {error}"
        raise type(error)(message) from error
    except ModuleNotFoundError as error:
        if error.name is None or f"{module}.".startswith(f"{error.name}."):
            message = f"{part} {name}: there is no module {error.name or module}; install it, or mend the name"
            raise InvalidCase(message) from error
        message = f"{part} {name}: it needs the package {error.name}, which is not installed"
        raise Unsupported(message) from error
    except Exception as error:
        message = f"{part} {name}: {module} cannot be imported ({type(error).__name__}: {one_line(error)})"
        raise InvalidCase(message) from error
    try:
        for step in attribute.split("."):
            found = getattr(found, step)
    except AttributeError as error:
        message = f"{part} {name}: {one_line(error)}; name the factory that the module has"
        raise InvalidCase(message) from error
    return found


def parse_options(key: str, text: str) -> dict[str, str]:
    """Parse `name=value`, several joined by semicolons.

    Raises:
        InvalidCase: another form, or a name that comes twice.
    """
    found: dict[str, str] = {}
    for one in filter(None, (part.strip() for part in text.split(";"))):
        name, equals, value = one.partition("=")
        if not equals or not _OPTION_NAME.fullmatch(name.strip()) or name.strip() in found:
            twice = "comes twice" if name.strip() in found else "allowed is name=value"
            message = f"{key} = {shown(one)}: {twice}; several are joined by semicolons"
            raise InvalidCase(message)
        found[name.strip()] = value.strip()
    return found


def canonical_options(key: str, text: str) -> str:
    """The options in the order of their names: one text for what means the same."""
    return ";".join(f"{name}={value}" for name, value in sorted(parse_options(key, text).items()))


def options_of(plugin: Plugin, key: str, text: str) -> Any:
    """The options of a case as an instance of `plugin.options`.

    Raises:
        InvalidCase: an option that the part does not have, or a value that it does not take.
    """
    given = parse_options(key, text)
    known = [field.encode_name for field in msgspec.structs.fields(plugin.options)]
    for name in given:
        if name not in known:
            allowed = ", ".join(known) or "none"
            message = f"{key} = {name}: {plugin.name} has no such option{closest(name, known)}; allowed are {allowed}"
            raise InvalidCase(message)
    try:
        return msgspec.convert(given, plugin.options, strict=False)
    except (msgspec.ValidationError, ValueError, OverflowError) as error:
        message = f"{key} = {shown(text)}: {plugin.name} refuses it ({one_line(error)})"
        raise InvalidCase(message) from error
