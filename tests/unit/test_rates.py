from __future__ import annotations

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbench.rates import Rate, trials_to_see


@pytest.mark.parametrize(
    ("seen", "tried", "low", "high"),
    [(0, 3, 0.0, 0.7076), (3, 3, 0.2924, 1.0), (1, 10, 0.0025, 0.4450), (50, 100, 0.3983, 0.6017)],
)
def test_bounds_are_those_of_the_tables(seen: int, tried: int, low: float, high: float) -> None:
    assert (Rate(seen, tried).low, Rate(seen, tried).high) == pytest.approx((low, high), abs=1e-4)


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 0.99))
def test_the_bounds_cover_the_true_rate_as_often_as_they_say(tried: int, rate: float) -> None:
    missed = math.fsum(
        math.comb(tried, seen) * rate**seen * (1 - rate) ** (tried - seen)
        for seen in range(tried + 1)
        if not Rate(seen, tried).low <= rate <= Rate(seen, tried).high
    )
    assert missed <= 0.05 + 1e-9


@given(st.floats(0.02, 0.99))
def test_so_many_clean_trials_speak_against_a_rate(rate: float) -> None:
    trials = trials_to_see(rate)
    assert Rate(0, trials).high <= rate + 1e-9
    assert trials == 1 or Rate(0, trials - 1).high > rate


def test_one_in_a_million() -> None:
    assert Rate(0, 10**9).high == pytest.approx(3.6889e-9, rel=1e-4)
    rate = Rate(3, 3_000_000)
    assert rate.low == pytest.approx(0.2062e-6, rel=1e-3)
    assert rate.high == pytest.approx(2.9224e-6, rel=1e-3)
