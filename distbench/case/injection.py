"""The syntax of a case's faults: `NAME[:key=value,…]`, several joined by semicolons."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib import resources

import msgspec

from distbench.case.plugins import FAULT, installed, is_reference
from distbench.errors import InvalidCase

# A plugin's fault by reference is a class, whose name begins with a capital letter: an option's never does.
_FAULT = re.compile(r"(?P<name>[A-Za-z_][\w.]*:[A-Z]\w*|[a-z0-9-]{1,40})(?::(?P<options>.*))?", re.ASCII)
_KEY = re.compile(r"[a-z_]{1,40}")
_OWN_NAME = re.compile(r'^    name(?:, \w+)* = "([a-z0-9-]+)"', re.MULTILINE)


class Injection(msgspec.Struct, frozen=True):
    """One requested fault: its name, and its options as written."""

    name: str
    options: dict[str, str]


def parse_inject(text: str) -> tuple[Injection, ...]:
    """Parse the faults of a case; valid names and options are known to distbench.faults alone.

    Raises:
        InvalidCase: the text has another form.

    """
    return tuple(_parse_one(part) for part in filter(None, (one.strip() for one in text.split(";"))))


@lru_cache
def own_faults() -> frozenset[str]:
    """Names of distbench's own faults, by the text of their modules, which load torch."""
    modules = (resources.files("distbench") / "faults").iterdir()
    texts = (module.read_text(encoding="utf-8") for module in modules if module.name.endswith(".py"))
    return frozenset({"mutant", *(name for text in texts for name in _OWN_NAME.findall(text))})


def is_brought(name: str) -> bool:
    """Whether a fault is a plugin's: a reference, or an entry point with a name that no fault of distbench has.

    Reads the metadata of packages for the latter.
    """
    return is_reference(name) or (name not in own_faults() and name in installed(FAULT))


def brings_faults(text: str) -> bool:
    """Whether a case's faults name code of other packages; a text that cannot be parsed names none."""
    try:
        return any(is_brought(fault.name) for fault in parse_inject(text))
    except InvalidCase:
        return False


def _parse_one(part: str) -> Injection:
    found = _FAULT.fullmatch(part)
    name, rest = (found["name"], found["options"] or "") if found and not part.endswith(":") else ("", part)
    pairs = [tuple(side.strip() for side in one.partition("=")[::2]) for one in rest.split(",")] if rest else []
    options = {key: value for key, value in pairs if _KEY.fullmatch(key) and value}
    if not name or len(options) < len(pairs):
        message = f"inject = {part!r:.80}: allowed is NAME[:key=value,…], such as flipped-bit:rank=1,arm=truncated"
        raise InvalidCase(message)
    return Injection(name, options)
