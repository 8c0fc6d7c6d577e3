"""Test whether one set of samples is slower than another, and the smallest slowdown that it would have detected.

The test is Mann and Whitney's, over several cases as van Elteren combines it (Bull. Inst. Int. Stat. 37, 1960): within
each case new samples are ranked among old ones, and the cases are summed with weights 1 / (n + m + 1). Consecutive
samples are correlated, so the variance is raised by (1 + r) / (1 - r), where r is the lag-1 autocorrelation of the
ranks, if positive. The detectable change is Noether's (J. Am. Stat. Assoc. 82, 1987), with the measured noise: the
differences of all pairs of logarithms about their median.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray

from distbench.utils.stats import median_error

ALPHA = 0.01
"""Probability that anything is called slower where nothing changed but the noise."""
POWER = 0.9
"""Probability that a slowdown of the detectable size is called one."""

Samples = NDArray[np.float64]

CONFIDENCE = 0.95
"""Probability with which an interval holds the true change."""

PLANNED_POWER = 0.95
"""Power of the design, above the promised one: the noise is itself an estimate."""
LEAST_SAMPLES = 10
"""Samples below which the noise of a series is unknown."""

_NANOSECOND_US = 1e-3
LONGEST_US = 1e15
"""Longest time that is taken for one, about 30 years: ratios of times, and sums of them, stay finite."""
_NORMAL = NormalDist()
_MOST_DIFFERENCES = 1 << 20
_MOST_POINTS, _LEAST_POINTS = 64, 8
_MOST_ALIKE = 0.99


class Pair(NamedTuple):
    """Samples of one case: a series for each old launch, and the new one's."""

    old: tuple[Samples, ...]
    new: Samples

    @property
    def before(self) -> Samples:
        """The samples of all old launches."""
        return self.old[0] if len(self.old) == 1 else np.concatenate(self.old)


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """Difference of new samples from old ones, as shares: 0.1 is 10 % slower.

    `detectable` is the smallest slowdown detected with probability POWER; None where no size would be. `slower` and
    `faster` hold where noise alone has a probability below `alpha` of as large a change. `between` is the standard
    deviation between launches of the same configuration; None where one old launch does not show it. `interval` is the
    95 % confidence interval of the change, by the same noise; None where the samples bound it on no side.
    """

    change: float
    detectable: float | None
    p_slower: float
    slower: bool
    faster: bool
    samples: tuple[int, int]
    between: float | None = None
    interval: tuple[float, float] | None = None


def readable(samples: Sequence[float]) -> Samples:
    """Samples in microseconds as an array; values below a nanosecond are raised to one.

    Raises:
        ValueError: a sample is negative, not finite or longer than 30 years, which no run took.

    """
    array = np.asarray(samples, dtype=np.float64)
    if not bool(np.all((array >= 0) & (array <= LONGEST_US))):
        message = "a time that is negative, not finite or longer than 30 years"
        raise ValueError(message)
    return np.maximum(array, _NANOSECOND_US)


def median_of(samples: Samples) -> float:
    """Median of samples, in their unit."""
    return float(np.median(samples))


def summed_error(cases: Sequence[Samples]) -> float | None:
    """Half the width of the 95 % confidence interval of the sum of the cases' medians, in their unit."""
    squares = 0.0
    for samples in cases:
        error = median_error(samples.tolist())
        if error is None:
            return None
        squares += (error * median_of(samples)) ** 2
    return math.sqrt(squares)


def judge_change(pairs: Sequence[Pair], alpha: float) -> Change:
    """Judge old and new samples of one case, or of several that are expected to change alike.

    Each series has LEAST_SAMPLES or more, in microseconds, as `readable` returns them.
    """
    weights = [1 / (pair.before.size + pair.new.size + 1) for pair in pairs]
    scores = [weight * _score(pair.before, pair.new) for weight, pair in zip(weights, pairs, strict=True)]
    deviation = math.sqrt(sum((weight * _deviation(pair)) ** 2 for weight, pair in zip(weights, pairs, strict=True)))
    step = min(weights) / 2
    p_slower, p_faster = _tail(sum(scores) - step, deviation), _tail(-sum(scores) - step, deviation)
    differences, shares = _differences(pairs, weights)
    needed = (_NORMAL.inv_cdf(1 - alpha) + _NORMAL.inv_cdf(PLANNED_POWER)) * deviation + step
    together = np.concatenate(differences)
    return Change(
        change=math.expm1(_quantile(together, shares, 0.5)),
        detectable=_detectable(pairs, differences, shares, needed),
        p_slower=p_slower,
        slower=p_slower < alpha,
        faster=p_faster < alpha,
        samples=(sum(pair.before.size for pair in pairs), sum(pair.new.size for pair in pairs)),
        interval=_interval(together, shares, deviation),
    )


def _interval(differences: Samples, shares: Samples, deviation: float) -> tuple[float, float] | None:
    """Shifts that the test does not reject (Hodges and Lehmann, Ann. Math. Stat. 34, 1963)."""
    margin = _NORMAL.inv_cdf((1 + CONFIDENCE) / 2) * deviation / float(shares.sum())
    if margin >= 0.5:  # noqa: PLR2004 - no sample lies beyond
        return None
    low, high = (math.expm1(_quantile(differences, shares, 0.5 + side * margin)) for side in (-1, 1))
    return low, high


def _score(old: Samples, new: Samples) -> float:
    """Mann and Whitney's U of the new samples less its expectation under noise alone."""
    ordered = np.sort(old)
    below = np.searchsorted(ordered, new, "left") + np.searchsorted(ordered, new, "right")
    return float(below.sum()) / 2 - old.size * new.size / 2


def _deviation(pair: Pair) -> float:
    """Standard deviation of `_score` under noise alone, corrected for ties and for autocorrelation."""
    old, new = pair.before, pair.new
    total = old.size + new.size
    together = np.concatenate((old, new))
    _, ties = np.unique(together, return_counts=True)
    tied = float((ties.astype(np.float64) ** 3 - ties).sum()) / (total * (total - 1))
    variance = old.size * new.size / 12 * (total + 1 - tied)
    alike = _autocorrelation(*pair.old, new)
    return math.sqrt(variance * (1 + alike) / (1 - alike))


def _autocorrelation(*launches: Samples) -> float:
    """Lag-1 autocorrelation r of the ranks within each series, all together; 0 where it is negative.

    From n samples r is biased by about -(1 + 4 r) / n (Kendall, Biometrika 41, 1954), which is corrected.
    """
    products = squares = 0.0
    for series in launches:
        ranks = np.argsort(np.argsort(series, kind="stable"), kind="stable") - (series.size - 1) / 2
        products += float(ranks[1:] @ ranks[:-1])
        squares += float(ranks @ ranks)
    size = len(launches) / sum(1 / series.size for series in launches)
    found = (size * products / squares + 1) / (size - 4)
    return min(max(found, 0.0), _MOST_ALIKE)


def _tail(score: float, deviation: float) -> float:
    if deviation == 0:
        return 1.0
    return 0.5 * math.erfc(score / deviation / math.sqrt(2))


def _differences(pairs: Sequence[Pair], weights: Sequence[float]) -> tuple[list[Samples], Samples]:
    """log(new / old) of each case's pairs of samples, thinned alike, and the weight of each pair."""
    points = int(math.sqrt(_MOST_DIFFERENCES / len(pairs)))
    points = max(_LEAST_POINTS, min(_MOST_POINTS, points))
    differences = [
        np.subtract.outer(_thinned(pair.new, points), _thinned(pair.before, points)).ravel() for pair in pairs
    ]
    shares = [
        np.full(found.size, weight * pair.before.size * pair.new.size / found.size)
        for found, weight, pair in zip(differences, weights, pairs, strict=True)
    ]
    return differences, np.concatenate(shares)


def _thinned(samples: Samples, points: int) -> Samples:
    ordered: Samples = np.sort(np.log(samples))
    if ordered.size <= points:
        return ordered
    chosen: Samples = ordered[np.linspace(0, ordered.size - 1, points).round().astype(np.int64)]
    return chosen


def _detectable(pairs: Sequence[Pair], differences: Sequence[Samples], shares: Samples, needed: float) -> float | None:
    """Shift at which the needed share of pairs has the new sample as the slower one.

    Differences about their own median are too small, since that median follows the noise; they are widened again.
    """
    noise = np.concatenate(
        [
            (found - np.median(found)) / math.sqrt(1 - (1 / pair.before.size + 1 / pair.new.size) / 2)
            for found, pair in zip(differences, pairs, strict=True)
        ]
    )
    share = 0.5 + needed / float(shares.sum())
    if share >= 1:
        return None
    return math.expm1(max(-_quantile(noise, shares, 1 - share), 0.0))


def _quantile(values: Samples, shares: Samples, at: float) -> float:
    order = np.argsort(values, kind="stable")
    cumulated = np.cumsum(shares[order])
    index = int(np.searchsorted(cumulated, at * cumulated[-1], "left"))
    return float(values[order[min(index, values.size - 1)]])
