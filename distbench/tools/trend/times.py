"""Times of each arm and stage over the nights, against the noise between nights.

The level of a night is that of a launch in compare: the median over cases of log(its median time / the mean of earlier
nights' median times). Earlier nights are the newest REFERENCES of those whose level was within its bounds, so that a
slowdown that lasts is out of bounds every night. The bounds are Student's, at a level that all arms and stages share:
half of ALPHA, since a night left out by chance makes those of the nights after it narrower. With noise alone the chance
that anything in a night is called slower is then below ALPHA.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from distbench.case.stages import ARMS, STAGES
from distbench.errors import InvalidCase
from distbench.report.results import Result
from distbench.tools.compare.launches import levels_of, spread_of
from distbench.tools.compare.noise import ALPHA, LONGEST_US, Samples

REFERENCES = 10
"""Most earlier nights that a night is held against."""

LEAST_NIGHTS = 5
"""Least number of earlier nights that shows how far nights lie apart."""

_NANOSECOND_US = 1e-3

Key = tuple[str, str]


class Level(NamedTuple):
    """A night's level in logarithms, 0 being the first night; `bounds` are None before LEAST_NIGHTS earlier nights.

    `typical_us` is the geometric mean over cases of their medians, microseconds; `change` is against the mean of the
    earlier nights, of which there are `references`.
    """

    level: float
    typical_us: float
    change: float
    bounds: tuple[float, float] | None
    references: int

    @property
    def slower(self) -> bool:
        """Whether noise does not explain how slow the night is."""
        return self.bounds is not None and self.level > self.bounds[1]

    @property
    def faster(self) -> bool:
        """Whether noise does not explain how fast the night is."""
        return self.bounds is not None and self.level < self.bounds[0]


class StageTrend(NamedTuple):
    """An arm's stage: its level in each night, None where the night has no time of it."""

    arm: str
    stage: str
    levels: list[Level | None]

    @property
    def last(self) -> Level | None:
        """Level of the newest night that has one."""
        return next((one for one in reversed(self.levels) if one is not None), None)

    @property
    def slower_since(self) -> int | None:
        """First of the nights, up to the newest, that were all slower; None where the newest is not."""
        first = None
        for night in reversed(range(len(self.levels))):
            level = self.levels[night]
            if level is not None and not level.slower:
                break
            first = night if level is not None else first
        return first


class Times:
    """Medians of the cases of all nights."""

    def __init__(self, nights: int) -> None:
        """Expect this number of nights."""
        self._nights = nights
        self._medians: dict[Key, list[tuple[array[int], array[float]]]] = {}

    def take(self, night: int, results: Sequence[Result], cases: Sequence[int]) -> None:
        """Add the times of a night's results, the numbers of whose cases are `cases`.

        Raises:
            InvalidCase: a time that is no number of microseconds.

        """
        for result, case in zip(results, cases, strict=True):
            timed = result.timed_arms
            for key, median_us in _medians(result):
                if not timed or key[0] in timed:  # with timed iterations, a pass that checks bits is no measurement
                    empty = [(array("l"), array("d")) for _ in range(self._nights)]
                    numbers, medians = self._medians.setdefault(key, empty)[night]
                    numbers.append(case)
                    medians.append(max(median_us, _NANOSECOND_US))

    def of_case(self, key: Key, cases: int) -> Samples:
        """Medians in microseconds, float64 [nights, cases]; NaN where there is none."""
        table = np.full((self._nights, cases), np.nan)
        for night, (numbers, medians) in enumerate(self._medians.get(key, ())):
            table[night, np.asarray(numbers, dtype=np.int64)] = np.asarray(medians)
        return table

    def trends(self, cases: int) -> list[StageTrend]:
        """Levels of every arm's stages."""
        alpha = ALPHA / 2 / max(len(self._medians), 1)
        return [StageTrend(*key, levels(np.log(self.of_case(key, cases)), alpha)) for key in self._medians]


def levels(medians: Samples, alpha: float) -> list[Level | None]:
    """Levels from logarithms of medians, float64 [nights, cases], with bounds that noise passes with chance `alpha`.

    A night without a case in common with any earlier one starts again at 0.
    """
    found: list[Level | None] = [None] * len(medians)
    within: list[int] = []
    there = ~np.isnan(medians)
    for night in range(len(medians)):
        if there[night].any():
            earlier = [one for one in within if (there[one] & there[night]).any()][-REFERENCES:]
            while not there[[*earlier, night]].all(axis=0).any():
                del earlier[0]
            common = np.flatnonzero(there[[*earlier, night]].all(axis=0))
            level = _level(medians, [*earlier, night], common, found, alpha)
            found[night] = level
            if not (level.slower or level.faster):
                within.append(night)
    return found


def _level(
    medians: Samples, nights: list[int], common: NDArray[np.int64], found: list[Level | None], alpha: float
) -> Level:
    """Level of the last of `nights` against the others."""
    *earlier, night = nights
    typical_us = math.exp(float(np.nanmean(medians[night])))
    if not earlier:
        return Level(0.0, typical_us, 0.0, None, 0)
    relative = levels_of(medians[nights][:, common].T)
    known = [one.level for one in (found[place] for place in earlier) if one is not None]
    base, change = sum(known) / len(known), float(relative[-1])
    bounds = None
    if len(earlier) >= LEAST_NIGHTS:
        reach = spread_of(relative[:-1]).bound(alpha)
        bounds = (base - reach, base + reach)
    return Level(base + change, typical_us, change, bounds, len(earlier))


def _medians(result: Result) -> list[tuple[Key, float]]:
    try:
        found = [
            ((time.arm, time.stage), time.median_us)
            for time in result.stage_times()
            if time.arm in ARMS and time.stage in STAGES
        ]
    except ValueError as error:
        message = f"case {result.name}: {error}; run it again"
        raise InvalidCase(message) from error
    for (arm, stage), median_us in found:
        if not 0 <= median_us <= LONGEST_US:
            message = f"case {result.name}: {arm}/{stage}: a time of {median_us} µs; run it again"
            raise InvalidCase(message)
    return found
