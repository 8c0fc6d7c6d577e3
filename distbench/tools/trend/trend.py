"""All that a trend says, from the nights."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

from distbench.errors import InvalidCase, Verdict
from distbench.report.results import Result
from distbench.tools.compare.environment import EnvironmentFinding, Surroundings
from distbench.tools.trend.history import Change, Histories, History
from distbench.tools.trend.nights import Night
from distbench.tools.trend.times import StageTrend, Times
from distbench.utils.text import counted


class NightTotals(NamedTuple):
    """A night in numbers: `planned` are cases with a result, and `missing` ones, which have none."""

    name: str
    path: str
    ended: str
    planned: int
    as_expected: int
    missing: int
    verdicts: Counter[Verdict]
    exit_code: int

    @property
    def share(self) -> float:
        """Share of the planned cases that ended as expected; 0 where none was planned."""
        return self.as_expected / self.planned if self.planned else 0.0

    @property
    def unexpected(self) -> int:
        """Cases with a result that was not expected."""
        return self.planned - self.missing - self.as_expected


class Trend(NamedTuple):
    """The nights, oldest first; every case; every stage's times; what changed in the environment, by night."""

    suites: list[str]
    nights: list[NightTotals]
    cases: list[History]
    times: Times
    stages: list[StageTrend]
    environment: list[tuple[int, list[EnvironmentFinding]]]

    def changes(self) -> Iterator[tuple[History, Change]]:
        """Yield the changes of every case."""
        held = [night.planned > night.missing for night in self.nights]
        for case in self.cases:
            for change in case.changes(held):
                yield case, change

    def troubled(self) -> list[History]:
        """Cases that ever ended unexpectedly: those that still do first, the longest of them."""
        found = [case for case in self.cases if case.went_bad is not None]

        def rank(case: History) -> tuple[int, int, str]:
            since = case.bad_since
            return (len(self.nights) if since is None else since, case.rate.seen - case.rate.tried, case.name)

        return sorted(found, key=rank)


def trend_of(nights: Sequence[Night], tell: Callable[[int, str], None]) -> Trend:
    """The trend of the nights; `tell` is given the number and the name of each before it is read.

    Raises:
        InvalidCase: results that cannot be read, or none in any night.

    """
    histories, times = Histories(len(nights)), Times(len(nights))
    totals: list[NightTotals] = []
    surroundings: list[tuple[int, Surroundings]] = []
    suites: set[str] = set()
    for number, night in enumerate(nights):
        tell(number, night.name)
        found = list(night.results)
        times.take(number, found, histories.take(number, found))
        suites |= {result.suite for result in found}
        totals.append(_totals(night, found))
        if found:
            surroundings.append((number, _surroundings(found)))
    if not histories.cases:
        message = f"trend: {counted(len(nights), 'night')} without a single result; run the suite to its first case"
        raise InvalidCase(message)
    return Trend(
        suites=sorted(filter(None, suites)),
        nights=totals,
        cases=histories.cases,
        times=times,
        stages=times.trends(len(histories.cases)),
        environment=[(number, before.against(now)) for (_, before), (number, now) in pairwise(surroundings)],
    )


def _totals(night: Night, found: Sequence[Result]) -> NightTotals:
    missing = night.results.missing
    return NightTotals(
        name=night.name,
        path=str(night.results.path),
        ended=night.ended,
        planned=len(found) + missing,
        as_expected=sum(result.as_expected for result in found),
        missing=missing,
        verdicts=Counter(result.verdict for result in found),
        exit_code=night.results.exit_code,
    )


def _surroundings(found: Sequence[Result]) -> Surroundings:
    made = Surroundings()
    for result in found:
        made.take(result.environment)
    return made
