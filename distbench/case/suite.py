"""Suites: many cases from one file (suite_file.py has the format), each with its expected ending."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from itertools import product
from typing import Any, NoReturn

import msgspec

from distbench.case.entry import Entry
from distbench.case.expectations import BY_LIMIT, expected_verdict
from distbench.case.identity import case_hash
from distbench.case.resolve import Layer, Resolved, check_fit, resolve_case, typed_value
from distbench.case.spec import FIELD_DEFAULTS, Case
from distbench.case.suite_file import CASE_KEYS, Draft, Keys, SuiteFile, read_suite_file
from distbench.case.tokens import spread_tokens
from distbench.errors import InvalidCase, Verdict
from distbench.utils.text import counted, one_line

_MAX_VALUE = 40


class Suite(msgspec.Struct, frozen=True):
    """Cases in execution order; names and case hashes are unique. `origin` names the file in messages.

    `merged` are cases of the file that equal another one, as pairs: its name, and the name of the case that runs.
    """

    name: str
    origin: str
    description: str
    entries: tuple[Entry, ...]
    merged: tuple[tuple[str, str], ...] = ()


def load_suite(
    name_or_path: str,
    ep_size: int,
    overrides: Sequence[Layer] = (),
    environment: Callable[[Sequence[Layer]], Sequence[Layer]] = lambda _: (),
) -> Suite:
    """Cases of a built-in suite or of a .toml or .json file, for a launch of `ep_size` ranks.

    `overrides` win over the file, the file over the layers of `environment`, which is given the stronger ones. Of equal
    cases the first stays, with the tags of all. A case that is expected to be INVALID may have values that do not fit
    together.

    Raises:
        InvalidCase: an unknown suite, disallowed content of the file, an invalid case, or equal cases with different
            expectations, unless they differ in an overridden key.

    """
    file = read_suite_file(name_or_path)
    overridden = {key for layer in overrides for key in layer.values}
    entries: dict[str, Entry] = {}
    names: Counter[str] = Counter()
    doubles: list[tuple[str, str]] = []
    drafts = list(_drafts(file, ep_size))
    merged = not overridden.isdisjoint(key for draft in drafts for key in draft.keys)
    for draft in drafts:
        name = draft.name or _name(draft.keys, overridden)
        own = Layer(f"suite:{file.name}", file.defaults | draft.keys)
        try:
            stronger = [*overrides, own]
            resolved = _resolve([*stronger, *environment(stronger)], ep_size)
            digest = case_hash(resolved.case)
            expect = draft.expect or _expected(file, resolved.case)
            if expected_verdict(expect) != Verdict.INVALID.value:
                check_fit(resolved.case)
        except (InvalidCase, UnicodeEncodeError) as error:
            message = f"{file.origin}: case {name}: {one_line(error)}"
            raise InvalidCase(message) from error
        first = entries.get(digest)
        if first is None:
            first = Entry(
                name=_unique(name, names),
                case=resolved.case,
                sources=resolved.sources,
                suite=file.name,
                expect=expect,
                warnings=resolved.notes,
            )
        elif expect != first.expect and not merged:
            message = (
                f"{file.origin}: case {name}: expect = {expect}, but it equals case {first.name}, which is expected to "
                f"end as {first.expect}; drop one of them, or expect the same"
            )
            raise InvalidCase(message)
        else:
            doubles.append((name, first.name))
        tags = tuple(dict.fromkeys(first.tags + file.tags + draft.tags))
        entries[digest] = msgspec.structs.replace(first, tags=tags)
    if not entries:
        message = f"{file.origin}: [[exclude]] leaves no case; drop one of them or add [[include]]"
        raise InvalidCase(message)
    return Suite(file.name, file.origin, file.description, tuple(entries.values()), tuple(doubles))


def select(entries: Sequence[Entry], expression: str) -> tuple[Entry, ...]:
    """Entries for which every comma-separated term of `expression` holds; all of them without terms.

    A term is a tag, `key=value` of the case (a glob: `limit=max-recv*`), or `name~text` (part of the name, or a glob of
    all of it). A leading `!` negates it.

    Raises:
        InvalidCase: an invalid term, or no entry is left; lists tags and keys.

    """
    chosen = tuple(entries)
    tags = sorted({tag for entry in entries for tag in entry.tags})
    for term in filter(None, (part.strip() for part in expression.split(","))):
        wanted = term.removeprefix("!").strip()
        key, equals, value = (part.strip() for part in wanted.partition("="))
        prefix, tilde, text = (part.strip() for part in wanted.partition("~"))
        if tilde and prefix == "name":
            held = [_holds(text, entry.name) for entry in chosen]
        elif equals and key in CASE_KEYS:
            held = [fnmatchcase(value_text(getattr(entry.case, key)), value) for entry in chosen]
        elif wanted in tags:
            held = [wanted in entry.tags for entry in chosen]
        else:
            _refuse_selection(f"the term {term!r:.80} is no tag, key=value or name~text", tags)
        chosen = tuple(entry for entry, one in zip(chosen, held, strict=True) if one != term.startswith("!"))
    if not chosen:
        _refuse_selection("no case is left", tags)
    return chosen


def value_text(value: Any) -> str:
    """Value of a case key as in names and selections: `true`, `0,1,7`, one number for all ranks."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return str(value[0]) if len(set(value)) == 1 else ",".join(str(one) for one in value)
    return str(value)


def _drafts(file: SuiteFile, ep_size: int) -> Iterator[Draft]:
    """Yield the product without exclusions, the last axis varying fastest, then the included cases.

    Exclusion uses the keys of the file and the case's defaults, not overrides or the environment.
    """
    base = FIELD_DEFAULTS | {"ep_size": ep_size} | file.defaults
    for combination in product(*file.axes.values()) if file.axes else ():
        keys = {key: value for element in combination for key, value in element.items()}
        values = base | keys
        if not any(_matches(wanted, values, values["ep_size"]) for wanted in file.exclude):
            yield Draft(keys, "", (), "")
    yield from file.include


def _matches(wanted: Keys, values: Keys, ep_size: int) -> bool:
    return all(key in values and _same(key, value, values[key], ep_size) for key, value in wanted.items())


def _same(key: str, first: Any, second: Any, ep_size: int) -> bool:
    if key == "tokens":
        return spread_tokens(first, ep_size) == spread_tokens(second, ep_size)
    return bool(first == second)


def _resolve(layers: Sequence[Layer], ep_size: int) -> Resolved:
    """Resolve a case that takes all ranks, or as many as it requests; its values are not checked for fit."""
    layer = next((layer for layer in layers if "ep_size" in layer.values), None)
    if layer is None:
        return resolve_case(layers, ep_size, fit=False)
    asked = typed_value("ep_size", layer.values["ep_size"], layer)
    if asked > ep_size:
        message = (
            f"ep_size = {asked} ({layer.source}): the launch has {counted(ep_size, 'rank')}; allowed is up to that"
        )
        raise InvalidCase(message)
    return resolve_case(layers, None, fit=False)


def _expected(file: SuiteFile, case: Case) -> str:
    values = {key: getattr(case, key) for key in CASE_KEYS} if file.expect else {}
    return next((rule.verdict for rule in file.expect if _matches(rule.match, values, case.ep_size)), BY_LIMIT)


def _name(keys: Keys, overridden: set[str]) -> str:
    """The keys that distinguish a case; overridden keys do not."""
    parts = [f"{key}={_short(value_text(value))}" for key, value in keys.items() if key not in overridden]
    return " ".join(parts) or "default"


def _short(text: str) -> str:
    printable = text if text.isprintable() else repr(text)
    return printable if len(printable) <= _MAX_VALUE else f"{printable[: _MAX_VALUE - 3]}..."


def _unique(name: str, names: Counter[str]) -> str:
    while True:
        names[name] += 1
        numbered = f"{name} #{names[name]}" if names[name] > 1 else name
        if numbered == name:
            return name
        if numbered not in names:
            names[numbered] = 1
            return numbered


def _holds(text: str, name: str) -> bool:
    return fnmatchcase(name, text) if set(text) & set("*?[") else text in name


def _refuse_selection(reason: str, tags: Sequence[str]) -> NoReturn:
    message = f"select: {reason}; tags are {', '.join(tags) or 'none'}, keys are {', '.join(CASE_KEYS)}"
    raise InvalidCase(message)
