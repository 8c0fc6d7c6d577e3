"""A fact about the text of a package, and its comparison with what distbench assumes."""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from distbench.utils.text import one_line
from tests.contract.facts.source import Gone, Source

State = Literal["matches", "no longer matches", "cannot be read"]
_SHOWN = 300


@dataclass(frozen=True)
class Fact:
    """`found` extracts a value from the text of a release, `expected` is distbench's for that version."""

    name: str
    package: str
    file: str
    found: Callable[[Source], Any]
    expected: Callable[[str], Any]


@dataclass(frozen=True)
class Finding:
    """The outcome of a fact on one release; `detail` says what was found instead, or why nothing was."""

    fact: Fact
    version: str
    state: State
    detail: str = ""


def check(fact: Fact, source: Source) -> Finding:
    """Compare a fact with a release. A missing file or definition is a change, broken text cannot be read."""
    try:
        found = fact.found(source)
    except Gone as error:
        return Finding(fact, source.version, "no longer matches", str(error.args[0]))
    except (SyntaxError, UnicodeDecodeError, OSError, zipfile.BadZipFile, zlib.error) as error:
        return Finding(fact, source.version, "cannot be read", f"{fact.file}: {_reason(error)}")
    except Exception as error:  # noqa: BLE001 - code of a release that was never run here
        return Finding(fact, source.version, "no longer matches", f"{fact.file} runs otherwise: {_reason(error)}")
    expected = fact.expected(source.version)
    detail = difference(found, expected)
    return Finding(fact, source.version, "no longer matches" if detail else "matches", detail)


def difference(found: object, expected: object) -> str:
    """What is found instead of the expected; empty where they are equal."""
    if found == expected:
        return ""
    if isinstance(found, Mapping) and isinstance(expected, Mapping) and list(found) != list(expected):
        new, gone = [key for key in found if key not in expected], [key for key in expected if key not in found]
        if new or gone:
            return _cut("; ".join(f"{word} {', '.join(map(str, keys))}" for word, keys in _named(new, gone)))
    if isinstance(found, Mapping) and isinstance(expected, Mapping):
        wrong = {key: value for key, value in found.items() if value != expected[key]}
        if wrong:
            return _cut("; ".join(f"{key}: {difference(value, expected[key])}" for key, value in wrong.items()))
    if isinstance(found, set | frozenset) and isinstance(expected, set | frozenset):
        changed = _named(sorted(map(str, found - expected)), sorted(map(str, expected - found)))
        return _cut("; ".join(f"{word} {', '.join(keys)}" for word, keys in changed))
    return _cut(f"{found!r} instead of {expected!r}")


def _named(new: list[Any], gone: list[Any]) -> list[tuple[str, list[Any]]]:
    return [(word, keys) for word, keys in (("new", new), ("gone", gone)) if keys]


def _cut(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {one_line(error)}"
