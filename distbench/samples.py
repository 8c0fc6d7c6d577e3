"""Statistics of timed iterations: order statistics only, no mean and no best-of."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

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
