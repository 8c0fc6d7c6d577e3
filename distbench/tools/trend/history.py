"""Each case over the nights: how it ended, what changed, and since when it ends as it should not."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import msgspec

from distbench.errors import Verdict
from distbench.report.results import Result
from distbench.tools.compare.comparison import kind_of
from distbench.utils.stats import Rate

OTHER_VERDICT, ANOTHER_CASE, ABSENT, NEW_FAILURE = "other verdict", "another case", "absent", "new failure"

_MOST_CHARACTERS = 300


class Ending(msgspec.Struct, frozen=True):
    """How a case ended in one night; `reason` is empty where that was expected."""

    verdict: Verdict
    as_expected: bool
    expect: str
    reason: str


class Change(NamedTuple):
    """A change of a case from the night before that has a result of it: the night's number, and its kind.

    Kinds are those of compare, and `other verdict` between two that were both expected.
    """

    night: int
    kind: str
    old: str
    new: str


class History(msgspec.Struct):
    """A case: one ending a night, None where the night has no result of it."""

    suite: str
    name: str
    hash: str
    endings: list[Ending | None]
    redefined: set[int]

    @property
    def bad_since(self) -> int | None:
        """First of the nights, up to the last result, that all ended unexpectedly; None where the last one did not."""
        first = None
        for night, ending in reversed(list(self._seen())):
            if ending.as_expected:
                break
            first = night
        return first

    @property
    def went_bad(self) -> int | None:
        """First night of all with an ending that was not expected."""
        return next((night for night, ending in self._seen() if not ending.as_expected), None)

    @property
    def rate(self) -> Rate:
        """Nights that ended as expected, of those with a result."""
        seen = [ending.as_expected for _, ending in self._seen()]
        return Rate(sum(seen), len(seen))

    @property
    def last(self) -> Ending | None:
        """The newest ending."""
        return next((ending for ending in reversed(self.endings) if ending is not None), None)

    def changes(self, held: Sequence[bool]) -> Iterator[Change]:
        """Yield what changed, night by night; `held` says which nights have any results, so that a case is absent."""
        known: Ending | None = None
        there = False
        for night, ending in enumerate(self.endings):
            if ending is None:
                if there and held[night]:
                    there = False
                    yield Change(night, ABSENT, known.verdict.value if known else "", "")
                continue
            kind = self._kind(night, known, ending)
            if kind:
                yield Change(night, kind, known.verdict.value if known else "", ending.verdict.value)
            known, there = ending, True

    def _kind(self, night: int, old: Ending | None, new: Ending) -> str:
        if old is None:
            return "" if new.as_expected or night == 0 else NEW_FAILURE
        if night in self.redefined:
            return ANOTHER_CASE
        alike = old.verdict is new.verdict and old.as_expected == new.as_expected
        return "" if alike else kind_of(old, new) or OTHER_VERDICT

    def _seen(self) -> Iterator[tuple[int, Ending]]:
        return ((night, ending) for night, ending in enumerate(self.endings) if ending is not None)


class Histories:
    """Histories of all cases. A case is known again by its hash, else by a name that the night has once."""

    def __init__(self, nights: int) -> None:
        """Expect this number of nights."""
        self.cases: list[History] = []
        self._nights = nights
        self._by_hash: dict[str, int] = {}
        self._by_name: dict[tuple[str, str], int] = {}
        self._alike: dict[Ending, Ending] = {}

    def take(self, night: int, results: Sequence[Result]) -> list[int]:
        """Add the results of a night; return the number of each one's case."""
        names = Counter((one.suite, one.name) for one in results)
        numbers = [self._by_hash.get(one.hash) for one in results]
        taken = set(filter(lambda number: number is not None, numbers))
        places = []
        for one, number in zip(results, numbers, strict=True):
            named = self._by_name.get((one.suite, one.name)) if names[one.suite, one.name] == 1 else None
            found = number if number is not None else named if named not in taken else None
            place = self._new(one) if found is None else found
            taken.add(place)
            case = self.cases[place]
            if case.hash != one.hash:
                case.redefined.add(night)
                case.hash = one.hash
                self._by_hash[one.hash] = place
            case.endings[night] = self._ending(one)
            self._by_name[one.suite, one.name] = place
            places.append(place)
        return places

    def _new(self, result: Result) -> int:
        self._by_hash[result.hash] = len(self.cases)
        self.cases.append(History(result.suite, result.name, result.hash, [None] * self._nights, set()))
        return len(self.cases) - 1

    def _ending(self, result: Result) -> Ending:
        """The ending of a result; equal ones are one object, since most cases end alike every night."""
        reason = "" if result.as_expected or not result.reasons else result.reasons[0].message[:_MOST_CHARACTERS]
        made = Ending(result.verdict, result.as_expected, result.expect, reason)
        return self._alike.setdefault(made, made)
