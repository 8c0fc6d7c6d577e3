"""Binomial rates from observed counts, with exact 95 % confidence intervals (2.5 % on each side)."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

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
