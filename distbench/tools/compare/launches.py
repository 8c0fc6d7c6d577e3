"""Variation between launches of the same configuration, and whether a new launch lies outside it.

Samples of one launch share its placement, clocks and neighbours, so their noise does not predict another launch's. The
level of a launch is the median over cases of log(its median time / the mean of the old launches' median times). Whether
a new level belongs to the old ones is tested by Student's t with k - 1 degrees of freedom: the level against the
standard deviation of the k old ones, times sqrt(1 + 1 / k).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np

from distbench.tools.compare.noise import CONFIDENCE, PLANNED_POWER, Change, Pair, Samples, judge_change
from distbench.utils.stats import student_quantile, student_tail

LEAST_LAUNCHES = 3
"""Least number of old launches that shows their variation; one launch is compared by its own noise alone."""

_WIDEST = 1e6


def judge_launches(pairs: Sequence[Pair], alpha: float) -> Change:
    """Change of new samples against those of several old launches, in cases that are expected to change alike.

    Slower means more than both the noise within launches and the variation between them explain.
    """
    within = judge_change(pairs, alpha)
    levels = levels_of(np.log([[float(np.median(series)) for series in (*pair.old, pair.new)] for pair in pairs]))
    new, spread = float(levels[-1]), spread_of(levels[:-1])
    far = new / spread.deviation if spread.deviation else math.copysign(_WIDEST, new)
    p_slower, p_faster = student_tail(far, spread.freedom), student_tail(-far, spread.freedom)
    needed = spread.bound(alpha) + spread.bound(1 - PLANNED_POWER)
    detectable = None if within.detectable is None else max(within.detectable, _as_share(needed))
    return msgspec.structs.replace(
        within,
        change=math.expm1(new),
        detectable=detectable,
        p_slower=max(within.p_slower, p_slower),
        slower=within.slower and p_slower < alpha,
        faster=within.faster and p_faster < alpha,
        between=_as_share(spread.between),
        interval=_interval(new, spread.bound((1 - CONFIDENCE) / 2), within.interval),
    )


def _interval(level: float, margin: float, within: tuple[float, float] | None) -> tuple[float, float] | None:
    """Interval that the distance of launches allows, and at least that of the noise within launches."""
    if within is None:
        return None
    return min(_as_share(level - margin), within[0]), max(_as_share(level + margin), within[1])


class Spread(NamedTuple):
    """Standard deviation between old launches, that of a new one's distance from their mean, degrees of freedom."""

    between: float
    deviation: float
    freedom: int

    def bound(self, alpha: float) -> float:
        """Distance in logarithms that a new launch like the old ones exceeds to one side with probability `alpha`."""
        return student_quantile(alpha, self.freedom) * self.deviation


def spread_of(levels: Samples) -> Spread:
    """Spread of the levels of LEAST_LAUNCHES old launches or more."""
    between = float(np.std(levels, ddof=1))
    return Spread(between, between * math.sqrt(1 + 1 / levels.size), levels.size - 1)


def levels_of(medians: Samples) -> Samples:
    """Level of each launch from logarithms of medians, float64 [cases, launches], the last launch being the new one.

    The mean level of the old launches is 0.
    """
    levels: Samples = np.median(medians - medians[:, :-1].mean(axis=1, keepdims=True), axis=0)
    levels -= levels[:-1].mean()
    return levels


def _as_share(log_ratio: float) -> float:
    return math.expm1(min(log_ratio, math.log(_WIDEST)))
