"""Facts for a caller: each file that is lifted has the definitions that are lifted from it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

from tests.contract.facts.fact import Fact
from tests.contract.facts.source import Gone, Source


def lifted_facts(package: str, definitions: Mapping[str, Sequence[str]]) -> tuple[Fact, ...]:
    """One fact for each file: no definition is missing."""
    return tuple(
        Fact(f"definitions lifted from {path.rpartition('/')[2]}", package, path, partial(_missing, path, names), _none)
        for path, names in definitions.items()
    )


def _missing(path: str, names: Sequence[str], source: Source) -> set[str]:
    return {f"{name} is missing" for name in names if not _has(source, path, name)}


def _has(source: Source, path: str, name: str) -> bool:
    try:
        source.definition(path, name)
    except Gone:
        return False
    return True


def _none(_: str) -> set[str]:
    return set()
