"""The format of a suite file, read and checked on its own: no ranks, no case yet.

    name = "short"                            # default: the file's name
    description = "what it shows"
    tags = ["quick"]                          # of all its cases

    [defaults]                                # keys of a case, for all cases
    model = "tiny"

    [axes]                                    # every combination, the last axis varying fastest
    policy = ["unchecked", "guard"]
    shape = [{ model = "tiny-odd", tokens = 3 }, { tokens = [0, 1, 7, 33, "..."] }]   # keys that vary together

    [[exclude]]                               # combinations that are left out: all of these keys hold
    policy = "guard"
    tokens = 3

    [[include]]                               # a case more: the defaults and these keys
    name = "far too short"
    tags = ["damage"]
    expect = "UNDER_LIMIT"
    policy = "unchecked"
    limit = "max-recv-3"

    [[expect]]                                # expected ending of cases; the first match counts
    verdict = "UNDER_LIMIT"
    match = { limit = "max-recv-3" }

JSON with the same keys works as well. Without `[axes]` the included cases are the whole suite.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import resources
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from distbench.case.expectations import ALLOWED, is_expectation
from distbench.case.limits import parse_limit
from distbench.case.resolve import Layer, decode_table, typed_value
from distbench.case.spec import FIELD_TYPES, UNSTORED_KEYS
from distbench.case.table_file import read_table_file
from distbench.errors import InvalidCase
from distbench.utils.text import closest, one_line, shown

CASE_KEYS = tuple(key for key in FIELD_TYPES if key not in UNSTORED_KEYS)
MAX_CASES = 100_000

_SECTIONS = ("name", "description", "tags", "defaults", "axes", "include", "exclude", "expect")
_INCLUDE_KEYS = ("name", "tags", "expect")
_MAX_RULES = 100
_MAX_TOKENS = 1024
_MAX_NAME = 80
_TAG_BREAKERS = ",=~!*"
_SUFFIXES = (".toml", ".json")

Keys = dict[str, Any]


class Draft(msgspec.Struct, frozen=True):
    """One case of a file: its own keys, its name or "", its tags, its expectation or ""."""

    keys: Keys
    name: str
    tags: tuple[str, ...]
    expect: str


class ExpectRule(msgspec.Struct, frozen=True):
    """Cases with these keys are expected to end in `verdict`, or by-limit."""

    verdict: str
    match: Keys


class SuiteFile(msgspec.Struct, frozen=True, kw_only=True):
    """A checked file. `origin` names it in messages; each axis is a list of tables of case keys."""

    origin: str
    name: str
    description: str
    tags: tuple[str, ...]
    defaults: Keys
    axes: dict[str, list[Keys]]
    include: list[Draft]
    exclude: list[Keys]
    expect: list[ExpectRule]


def builtin_suites() -> dict[str, bytes]:
    """Files of the suites that come with distbench, by name."""
    folder = resources.files("distbench.case") / "suites"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".toml")), key=lambda file: file.name)
    return {file.name.removesuffix(".toml"): file.read_bytes() for file in files}


def read_suite_file(name_or_path: str) -> SuiteFile:
    """Suite of a built-in name, or from a .toml or .json file.

    Raises:
        InvalidCase: an unknown suite or file, or disallowed content: names the file, key and value, and what is
        allowed.

    """
    if not name_or_path.endswith(_SUFFIXES):
        builtin = builtin_suites()
        if name_or_path not in builtin:
            names = ", ".join(builtin)
            near = closest(name_or_path, builtin)
            message = f"suite {shown(name_or_path)}{near}: allowed are {names}, or the path of a .toml or .json file"
            raise InvalidCase(message)
        return parse_suite(f"{name_or_path}.toml", builtin[name_or_path])
    try:
        content = read_table_file(name_or_path)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or one_line(error)
        message = f"suite {shown(name_or_path)}: cannot be read ({reason}); give a readable .toml or .json file"
        raise InvalidCase(message) from error
    return parse_suite(name_or_path, content)


def parse_suite(path: str, content: bytes) -> SuiteFile:
    """Check the bytes of the suite file `path`.

    Raises:
        InvalidCase: disallowed content: names the file, key and value, and what is allowed.

    """
    origin = one_line(path)
    table = decode_table(origin, content)
    _only(origin, table, _SECTIONS)
    rules = [_rule(where, rule) for where, rule in _tables(f"{origin}: expect", table.get("expect", []))]
    exclude = [_case_keys(where, keys) for where, keys in _tables(f"{origin}: exclude", table.get("exclude", []))]
    for name, found in (("expect", rules), ("exclude", exclude)):
        if len(found) > _MAX_RULES:
            message = f"{origin}: {name}: {len(found)} tables; allowed are up to {_MAX_RULES}"
            raise InvalidCase(message)
    file = SuiteFile(
        origin=origin,
        name=_name(f"{origin}: name", table.get("name", Path(origin).stem)),
        description=_text(f"{origin}: description", table.get("description", "")),
        tags=_tags(f"{origin}: tags", table.get("tags", [])),
        defaults=_case_keys(f"{origin}: defaults", table.get("defaults", {})),
        axes=_axes(f"{origin}: axes", table.get("axes", {})),
        include=[_included(*found) for found in _tables(f"{origin}: include", table.get("include", []))],
        exclude=exclude,
        expect=rules,
    )
    _check_count(file)
    return file


def _check_count(file: SuiteFile) -> None:
    sizes = [len(axis) for axis in file.axes.values()]
    count = (math.prod(sizes) if sizes else 0) + len(file.include)
    if count > MAX_CASES:
        number = count if count < MAX_CASES**2 else "far too many"
        message = f"{file.origin}: axes: {number} cases; allowed are up to {MAX_CASES}, with the included ones"
        raise InvalidCase(message)
    if not count:
        message = f"{file.origin}: no cases; give [axes] with a list of values for each key, or [[include]] tables"
        raise InvalidCase(message)


def _axes(where: str, value: Any) -> dict[str, list[Keys]]:
    axes: dict[str, list[Keys]] = {}
    owners: dict[str, str] = {}
    for axis, elements in _table(where, value).items():
        here = f"{where}.{_key(axis)}"
        if not isinstance(elements, list) or not elements:
            _refuse(here, elements, "a list of one value or more")
        axes[axis] = [_element(f"{here}[{number}]", axis, element) for number, element in enumerate(elements)]
        for key in dict.fromkeys(key for element in axes[axis] for key in element):
            if key in owners:
                message = (
                    f"{here}: {key} is varied by axes.{_key(owners[key])} already; put them into one axis of tables"
                )
                raise InvalidCase(message)
            owners[key] = axis
    return axes


def _element(where: str, axis: str, element: Any) -> Keys:
    if isinstance(element, dict):
        if not element:
            _refuse(where, element, "a table of one case key or more")
        return _case_keys(where, element)
    return _case_keys(where, {axis: element})


def _included(where: str, value: Keys) -> Draft:
    keys = {key: raw for key, raw in value.items() if key not in _INCLUDE_KEYS}
    return Draft(
        keys=_case_keys(where, keys, _INCLUDE_KEYS),
        name=_name(f"{where}.name", value["name"]) if "name" in value else "",
        tags=_tags(f"{where}.tags", value.get("tags", [])),
        expect=_expectation(f"{where}.expect", value["expect"]) if "expect" in value else "",
    )


def _rule(where: str, value: Keys) -> ExpectRule:
    _only(where, value, ("verdict", "match"))
    verdict = _expectation(f"{where}.verdict", value.get("verdict"))
    return ExpectRule(verdict, _case_keys(f"{where}.match", value.get("match", {})))


def _case_keys(where: str, value: Any, others: Iterable[str] = ()) -> Keys:
    """Table of case keys with typed values, limits in their canonical form."""
    table = _table(where, value)
    _only(where, table, (*others, *CASE_KEYS))
    keys = {key: typed_value(key, raw, Layer(where, {})) for key, raw in table.items()}
    tokens = keys.get("tokens")
    if isinstance(tokens, tuple) and len(tokens) > _MAX_TOKENS:
        _refuse(f"{where}: tokens", tokens, f'a list of up to {_MAX_TOKENS}; end it in "..." to repeat it')
    if "limit" in keys:
        try:
            keys["limit"] = parse_limit(keys["limit"])
        except InvalidCase as error:
            message = f"{where}: {error}"
            raise InvalidCase(message) from error
    return keys


def _only(where: str, table: Keys, allowed: tuple[str, ...]) -> None:
    for key in table:
        if key not in allowed:
            message = (
                f"{where}: unknown key {_key(key)!r}{closest(str(key), allowed)}; allowed are {', '.join(allowed)}"
            )
            raise InvalidCase(message)


def _table(where: str, value: Any) -> Keys:
    if not isinstance(value, dict):
        _refuse(where, value, "a table")
    return value


def _tables(where: str, value: Any) -> list[tuple[str, Keys]]:
    if not isinstance(value, list):
        _refuse(where, value, "a list of tables")
    return [(f"{where}[{number}]", _table(f"{where}[{number}]", one)) for number, one in enumerate(value)]


def _text(where: str, value: Any) -> str:
    if not isinstance(value, str):
        _refuse(where, value, "text")
    return value


def _name(where: str, value: Any) -> str:
    text = _text(where, value)
    if not 0 < len(text) <= _MAX_NAME or not text.isprintable() or text != text.strip():
        _refuse(where, text, f"one line of 1 to {_MAX_NAME} characters")
    return text


def _tags(where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list):
        _refuse(where, value, "a list of words")
    for tag in value:
        if set(_name(where, tag)) & set(_TAG_BREAKERS):
            _refuse(where, tag, f"words without any of {_TAG_BREAKERS}")
    return tuple(dict.fromkeys(value))


def _expectation(where: str, value: Any) -> str:
    if not isinstance(value, str) or not is_expectation(value):
        _refuse(where, value, ALLOWED)
    return value


def _key(key: str) -> str:
    return key if key.isprintable() and len(key) <= _MAX_NAME else shown(key)


def _refuse(where: str, value: Any, allowed: str) -> NoReturn:
    message = f"{where} = {shown(value)}: allowed is {allowed}"
    raise InvalidCase(message)
