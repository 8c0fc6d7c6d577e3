"""How often something happens, from how often it was seen: exact bounds, sure on each side to 97.5 %."""

from __future__ import annotations

import math
from collections.abc import Callable

import msgspec

_TAIL = 0.025
_HALVINGS = 60


class Rate(msgspec.Struct, frozen=True):
    """`seen` of `tried`, and the bounds of Clopper and Pearson (1934), which hold for any number of trials."""

    seen: int
    tried: int

    @property
    def low(self) -> float:
        """The rate below which as many as were seen would come up in fewer than one row of trials in forty."""
        return 0.0 if self.seen == 0 else _solve(lambda rate: 1 - self._at_most(self.seen - 1, rate))

    @property
    def high(self) -> float:
        """The rate above which as few would."""
        return 1.0 if self.seen == self.tried else 1 - _solve(lambda rest: self._at_most(self.seen, 1 - rest))

    @property
    def always(self) -> bool:
        """Whether every trial had it."""
        return self.seen == self.tried

    def __str__(self) -> str:
        """Return it with its bounds: `3 of 8, 9 to 76 %`."""
        return f"{self.seen} of {self.tried}, {100 * self.low:.3g} to {100 * self.high:.3g} %"

    def _at_most(self, count: int, rate: float) -> float:
        """Return the probability of `count` or fewer."""
        return math.fsum(
            math.comb(self.tried, one) * rate**one * (1 - rate) ** (self.tried - one) for one in range(count + 1)
        )


def trials_to_see(rate: float) -> int:
    """Return how many trials without it speak against `rate`, 39 to 1."""
    return 1 if rate >= 1 else math.ceil(math.log(_TAIL) / math.log1p(-rate))


def _solve(rising: Callable[[float], float]) -> float:
    """Return where `rising`, from 0 at 0, reaches the tail."""
    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if rising(middle) < _TAIL else (low, middle)
    return low
