"""Errors of rows relative to an ideal kernel, in three figures with bounds (docs/gaussian.md derives them)."""

from __future__ import annotations

import math
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.verify.ideal import Ideal

FALSE_ALARMS = 1e-6
"""Fraction of fault-free cases that may fall outside their bounds."""

# Allowance between kernels of one family: another order of float32 sums flips few roundings.
_SLACK = 0.02
_BIAS_SLACK = 0.01
# Steps are those at the ideal's values; another right kernel may be in the next binade.
_DEVIATION_SLACK = 1.25
# A rounding of any values, within half a step, has a variance of a quarter of the step's square, not of a twelfth.
_ANY_ROUNDING = 3.0
# Where the sum of squares may be off by more of itself than this, it is the expected one that errors are held against.
_FEW = 0.5
# Fewer rows do not tell how much orders of adds matter.
_FEW_ROWS = 8


class Figures(NamedTuple):
    """See `verify.records.ArmError`."""

    rows: int
    nan_rows: int
    ratio: float | None
    bias: float | None
    worst: float | None
    ideal_worst: float
    allowed: dict[str, float]
    within: bool


def sure(tests: int) -> float:
    """Return the z that a sum of symmetric bounded errors exceeds in any of `tests` with probability FALSE_ALARMS.

    Hoeffding: P(|sum| > z * root of the sum of squares) <= 2 exp(-z**2 / 2).
    """
    return math.sqrt(2 * math.log(2 * tests / FALSE_ALARMS))


class Yardstick:
    """Expected values of some rows, in float64 and by an ideal kernel, against which results are measured."""

    def __init__(self, exact: Tensor, ideal: Ideal, sure_of: float, *, drawn: bool = True) -> None:
        """Take exact float32 [n, H], the ideal of the same rows, and the deviations allowed to an estimate (`sure`).

        `rows` is n. Tokens that are not `drawn` from a known distribution, but recorded, may have any errors within
        half a step instead of uniform ones.
        """
        self._exact, self._sure, self._tokens_drawn = exact, sure_of, drawn
        self._ideal = ideal
        self.rows = exact.shape[0]
        self._most = exact.abs().amax(1)
        rms = exact.square().mean(1, keepdim=True).sqrt()
        there = rms > 0
        self._scale = torch.where(there, rms, 1.0)
        self._signs = exact.sign()
        self._elements = int(there.count_nonzero()) * exact.shape[1]
        error = ideal.rows.float() - exact
        self._ideal_worst = _most(error.abs().amax(1) / self._most)
        error /= self._scale
        self._bias = float((error * self._signs).sum(dtype=torch.float64))
        self._drawn = float(error.square_().sum(dtype=torch.float64))
        self._power, self._spread = self._expected(ideal)
        self._deviation = ideal.variance.mul(self._widening).sqrt_().mul_(_DEVIATION_SLACK)

    @property
    def _widening(self) -> float:
        """What a variance is multiplied by, to bound that of any rounding."""
        return 1.0 if self._tokens_drawn else _ANY_ROUNDING

    def _expected(self, ideal: Ideal) -> tuple[float, float]:
        """Return the power that errors are held against, and how far a right kernel's is from the ideal's at most."""
        squared = self._scale.square()
        variance = ideal.variance / squared
        power = float(variance.sum(dtype=torch.float64))
        if not power:
            return self._drawn, 0.0
        reverse, most = (ideal.order / squared).double().unbind(1)
        squares = 4 * float(variance.square().sum(dtype=torch.float64)) + float(reverse.square().sum())
        spread = self._sure * math.sqrt(squares) + self._sure**2 * float(variance.amax())
        if self.rows < _FEW_ROWS:
            spread += float(most.sum())
        spread *= self._widening
        if spread > _FEW * power:
            return max(self._drawn, power), spread
        if not self._tokens_drawn:
            return self._drawn, spread
        likely = min(power, self._drawn + spread)  # variances are bounds where steps or orders are not known
        return self._drawn, spread * min(max(likely, self._drawn) / power, 1.0)

    def part(self, kept: Tensor) -> Yardstick:
        """Return the yardstick of the rows `kept`, bool [n]."""
        if bool(kept.all()):
            return self
        ideal = Ideal(*(part[kept] for part in self._ideal))
        return Yardstick(self._exact[kept], ideal, self._sure, drawn=self._tokens_drawn)

    @cached_property
    def loosest(self) -> float:
        """The bound on the largest error of any of the rows, as a share of the row's largest magnitude."""
        return _most(self._deviation.amax(1) * self._extreme / self._most) if self.rows else 0.0

    @cached_property
    def _bounds(self) -> Tensor:
        """The bound on each element's error, float32 [n, H]."""
        return self._deviation * self._extreme

    @property
    def _extreme(self) -> float:
        """Deviations that no element exceeds: errors are sums of uniform ones, and normal where many are added."""
        return math.sqrt(self._sure**2 + 2 * math.log(max(self._elements, 1)))

    def measure(self, actual: Tensor) -> Figures:
        """Return the figures of rows `actual` [n, H]."""
        error = actual.float() - self._exact
        size = error.abs()
        allowed = self._allowed()
        if self.rows and not math.isfinite(float(size.amax())):
            nan_rows = int((~size.isfinite().all(1)).sum())
            return Figures(self.rows, nan_rows, None, None, None, self._ideal_worst, allowed, within=False)
        excess, worst, bound = self._worst(size)
        error /= self._scale
        bias = (float((error * self._signs).sum(dtype=torch.float64)) - self._bias) / math.sqrt(2 * self._power or 1.0)
        power = float(error.square_().sum(dtype=torch.float64))
        ratio = math.sqrt(power / self._power) if self._power else (1.0 if power == 0 else math.inf)
        allowed["worst"] = bound
        within = allowed["ratio_low"] <= ratio <= allowed["ratio_high"] and abs(bias) <= allowed["bias"] and excess <= 1
        return Figures(
            self.rows, 0, _finite(ratio), _finite(bias), _finite(worst), self._ideal_worst, allowed, within=within
        )

    def _allowed(self) -> dict[str, float]:
        count = max(self._elements, 1)
        low, high = 1.0, 1.0
        if self._power:
            low = max(self._drawn - self._spread, 0.0) / self._power
            high = (self._drawn + self._spread) / self._power
        return {
            "ratio_low": (1 - _SLACK) * math.sqrt(low),
            "ratio_high": (1 + _SLACK) * math.sqrt(high),
            "bias": self._sure + _BIAS_SLACK * math.sqrt(count / 2),
            "worst": 0.0,
        }

    def _worst(self, size: Tensor) -> tuple[float, float, float]:
        """Return the largest share of a row's bound that an error takes, that row's largest error, and its bound.

        Error and bound are shares of the row's largest magnitude; `size` are the errors' magnitudes, all finite.
        """
        if not self.rows:
            return 0.0, 0.0, 0.0
        bounds = self._bounds
        taken = (size / bounds).nan_to_num_(0.0, posinf=math.inf).amax(1)  # no error is no share of a bound of 0
        row = int(taken.argmax())
        excess, most = float(taken[row]), float(size[row].amax())
        share = most / float(self._most[row]) if float(self._most[row]) else (0.0 if most == 0 else math.inf)
        bound = share / excess if 0 < excess < math.inf else float(bounds[row].amax() / self._most[row])
        return excess, share, bound if math.isfinite(bound) else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _most(shares: Tensor) -> float:
    """Return the largest of shares [n], ignoring rows of zeros."""
    return float(shares.nan_to_num(0.0, posinf=0.0).amax()) if len(shares) else 0.0
