"""Student's t distribution."""

from __future__ import annotations

import math

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
