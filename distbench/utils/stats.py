"""Statistics of timed iterations and of failures: percentiles, exact bounds of a rate, Student's t."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

import msgspec

_NORMAL_95 = 1.96


def percentile(samples: Sequence[float], percent: int) -> float:
    """Smallest sample that at least `percent` % of the samples do not exceed (nearest rank)."""
    ordered = sorted(samples)
    return ordered[max(-(-percent * len(ordered) // 100), 1) - 1]


def median_error(samples: Sequence[float]) -> float | None:
    """Half the width of the median's 95 % confidence interval, as a share of the median.

    The interval lies between order statistics and assumes no distribution (Conover, "Practical Nonparametric
    Statistics", the quantile interval). None for fewer than 6 samples, which hold no such interval.
    """
    count = len(samples)
    low = math.floor(count / 2 - _NORMAL_95 * math.sqrt(count) / 2)
    if low < 1:
        return None
    ordered = sorted(samples)
    middle = statistics.median(ordered)
    return (ordered[count - low] - ordered[low - 1]) / 2 / middle if middle else None


_TAIL = 0.025
_HALVINGS = 60
_TINY = 1e-300
_TERMS = 10_000


class Rate(msgspec.Struct, frozen=True):
    """`seen` of `tried`, with the bounds of Clopper and Pearson (1934), which hold for any number of trials."""

    seen: int
    tried: int

    @property
    def low(self) -> float:
        """Lower bound: at this rate, at least `seen` occurrences have a probability of 2.5 %; 0 where none was seen."""
        return 0.0 if self.seen == 0 else _solve(lambda rate: _beta(self.seen, self.tried - self.seen + 1, rate))

    @property
    def high(self) -> float:
        """Upper bound: at this rate, at most `seen` occurrences have that probability; about 3.7 / tried for none."""
        if self.seen == self.tried:
            return 1.0
        if self.seen == 0:
            return -math.expm1(math.log(_TAIL) / self.tried)
        return _solve(lambda rate: _beta(self.seen + 1, self.tried - self.seen, rate), 1 - _TAIL)

    @property
    def always(self) -> bool:
        """Whether every trial was a hit."""
        return self.seen == self.tried

    def __str__(self) -> str:
        """Counts with the bounds: `3 of 8, 9 to 76 %`."""
        return f"{self.seen} of {self.tried}, {100 * self.low:.3g} to {100 * self.high:.3g} %"


def trials_to_see(rate: float) -> int:
    """Number of trials without a hit that rules out a `rate` above 0, at odds of 39 to 1."""
    return 1 if rate >= 1 else math.ceil(math.log(_TAIL) / math.log1p(-rate))


def _solve(rising: Callable[[float], float], level: float = _TAIL) -> float:
    """Argument at which `rising`, from 0 at 0 to 1 at 1, reaches `level`."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < level else (low, middle)
    return low


def _beta(first: float, second: float, point: float) -> float:
    """Regularised incomplete beta function: the probability of `first` or more hits in first + second - 1 trials."""
    if point in (0.0, 1.0):
        return point
    if point > (first + 1) / (first + second + 2):
        return 1 - _beta(second, first, 1 - point)
    logs = math.lgamma(first + second) - math.lgamma(first) - math.lgamma(second)
    front = math.exp(logs + first * math.log(point) + second * math.log1p(-point))
    return front * _fraction(first, second, point) / first


def _fraction(first: float, second: float, point: float) -> float:
    """Continued fraction of the incomplete beta function by Lentz's method (DLMF 8.17.22)."""
    upper, lower, value = 1.0, 0.0, 1.0
    for term in range(_TERMS):
        half = term // 2
        if term == 0:
            factor = 1.0
        elif term % 2 == 0:
            factor = half * (second - half) * point / ((first + term - 1) * (first + term))
        else:
            factor = -(first + half) * (first + second + half) * point / ((first + term - 1) * (first + term))
        lower = 1 / _nonzero(1 + factor * lower)
        upper = _nonzero(1 + factor / upper)
        value *= upper * lower
        if term and abs(upper * lower - 1) < 1e-12:  # noqa: PLR2004 - far closer than anyone asks
            break
    return value - 1


def _nonzero(value: float) -> float:
    return value if abs(value) > _TINY else _TINY


_WIDEST = 1e6


def student_tail(t: float, freedom: int) -> float:
    """Probability that Student's t of `freedom` degrees of freedom exceeds `t` (Abramowitz and Stegun 26.7)."""
    angle = math.atan(t / math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (cosine, 0.0) if odd else (1.0, 0.0)
    for step in range(1 + odd, freedom, 2):
        total += term
        term *= cosine**2 * step / (step + 1)
    inside = (angle + sine * total) * 2 / math.pi if odd else sine * total
    return (1 - inside) / 2


def student_quantile(tail: float, freedom: int) -> float:
    """Value that Student's t exceeds with probability `tail`, below one half."""
    low, high = 0.0, 1.0
    while student_tail(high, freedom) > tail and high < _WIDEST:
        high *= 2
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if student_tail(middle, freedom) > tail else (low, middle)
    return high
