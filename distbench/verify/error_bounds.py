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
        error = ideal.rows.float() - exact
        largest = error.abs().amax(1)
        error /= self._scale
        bias = (error * self._signs).sum(dtype=torch.float64)
        found = [there.count_nonzero(), _most(largest / self._most), bias, error.square_().sum(dtype=torch.float64)]
        counted, self._ideal_worst, self._bias, self._drawn, *moments = _read(*found, *self._moments(ideal))
        self._elements = int(counted) * exact.shape[1]
        self._power, self._spread = self._expected(*moments)
        self._deviation = ideal.variance.mul(self._widening).sqrt_().mul_(_DEVIATION_SLACK)

    @property
    def _widening(self) -> float:
        """What a variance is multiplied by, to bound that of any rounding."""
        return 1.0 if self._tokens_drawn else _ANY_ROUNDING

    def _moments(self, ideal: Ideal) -> list[Tensor]:
        """Return sums of the variances, of their squares, of those of the reverse order, and of the most, and the peak.

        The variances are those of errors as shares of their row's scale.
        """
        squared = self._scale.square()
        variance = ideal.variance / squared
        reverse, most = (ideal.order / squared).double().unbind(1)
        peak = variance.amax() if self.rows else variance.sum()
        power, squares = (one.sum(dtype=torch.float64) for one in (variance, variance.square()))
        return [power, squares, reverse.square().sum(), most.sum(), peak]

    def _expected(self, power: float, squares: float, reverse: float, most: float, peak: float) -> tuple[float, float]:
        """Return the power that errors are held against, and how far a right kernel's is from the ideal's at most.

        The arguments are `_moments`.
        """
        if not power:
            return self._drawn, 0.0
        spread = self._sure * math.sqrt(4 * squares + reverse) + self._sure**2 * peak
        if self.rows < _FEW_ROWS:
            spread += most
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
        return float(_most(self._deviation.amax(1) * self._extreme / self._most))

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
        largest = size.amax(1)
        error /= self._scale
        sums = (error * self._signs).sum(dtype=torch.float64), error.square_().sum(dtype=torch.float64)
        signed, power, *places = _read(*sums, *self._worst_row(size, largest))
        if self.rows and not math.isfinite(places[0]):
            nan_rows = int((~size.isfinite().all(1)).sum())
            return Figures(self.rows, nan_rows, None, None, None, self._ideal_worst, allowed, within=False)
        excess, worst, bound = self._worst(*places[1:]) if self.rows else (0.0, 0.0, 0.0)
        bias = (signed - self._bias) / math.sqrt(2 * self._power or 1.0)
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

    def _worst_row(self, size: Tensor, largest: Tensor) -> list[Tensor]:
        """Return the largest error of all, and the row whose errors take the largest share of their bounds.

        For that row, its number, the share, its largest error and its largest magnitude. `size` [n, H] are the errors'
        magnitudes, `largest` [n] those of rows.
        """
        if not self.rows:
            return []
        taken = (size / self._bounds).nan_to_num_(0.0, posinf=math.inf).amax(1)  # no error is no share of a bound of 0
        row = taken.argmax()
        place = row.view(1)
        return [largest.amax(), row, *(part.index_select(0, place).squeeze(0) for part in (taken, largest, self._most))]

    def _worst(self, row: float, excess: float, most: float, magnitude: float) -> tuple[float, float, float]:
        """Return the share of its bound that the worst row's errors take, its largest error, and its bound.

        Error and bound are shares of the row's largest magnitude; the arguments are of `_worst_row`.
        """
        share = most / magnitude if magnitude else (0.0 if most == 0 else math.inf)
        place = int(row)
        bound = share / excess if 0 < excess < math.inf else float(self._bounds[place].amax() / self._most[place])
        return excess, share, bound if math.isfinite(bound) else 0.0


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _most(shares: Tensor) -> Tensor:
    """Return the largest of shares [n], ignoring rows of zeros; 0 for no row."""
    shares = shares.nan_to_num(0.0, posinf=0.0)
    return shares.amax() if shares.shape[0] else shares.sum()


def _read(*numbers: Tensor) -> list[float]:
    """Return tensors of one number each as numbers; the host waits for a device once, not for each."""
    if numbers[0].is_cpu:
        return [float(one) for one in numbers]
    found: list[float] = torch.stack([one.double() for one in numbers]).tolist()
    return found
