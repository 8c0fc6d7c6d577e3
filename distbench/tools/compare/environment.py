"""Differences between two sets of results in machines and packages."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from distbench.report.environment import Environment


class EnvironmentFinding(msgspec.Struct, frozen=True, kw_only=True):
    """A fact of the environment, such as `versions.torch`, with its values on both sides; empty where unknown."""

    what: str
    old: list[str]
    new: list[str]


class Surroundings:
    """The values of each fact of the environments of one side's results."""

    def __init__(self) -> None:
        """Start with none."""
        self._values: dict[str, set[str]] = {}

    def take(self, environment: Environment) -> None:
        """Note the environment of one result."""
        for what, values in _facts(environment):
            self._values.setdefault(what, set()).update(values)

    def against(self, new: Surroundings) -> list[EnvironmentFinding]:
        """Facts whose values differ, `self` being the old side; packages first, then the rest by name."""
        names = sorted(self._values.keys() | new._values.keys(), key=lambda name: (_rank(name), name))
        pairs = [(name, self._values.get(name, set()), new._values.get(name, set())) for name in names]
        return [
            EnvironmentFinding(what=name, old=sorted(old), new=sorted(found))
            for name, old, found in pairs
            if old != found
        ]


_ORDER = ("versions", "commits", "system", "devices", "variables", "hosts")


def _rank(name: str) -> int:
    return _ORDER.index(name.partition(".")[0])


def _facts(environment: Environment) -> Iterator[tuple[str, Iterable[str]]]:
    yield "hosts", environment.hosts
    yield "devices", environment.devices
    for group in ("versions", "commits", "variables", "system"):
        for name, value in getattr(environment, group).items():
            yield f"{group}.{name}", (value,)
