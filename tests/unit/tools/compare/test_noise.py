"""False alarm rate and power of the comparison: within ALPHA, and at least POWER at the detectable shift."""

from __future__ import annotations

import math
from collections.abc import Callable
from math import comb

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench.tools.compare.noise import (
    ALPHA,
    CONFIDENCE,
    LONGEST_US,
    POWER,
    Change,
    Pair,
    Samples,
    judge_change,
    readable,
    summed_error,
)

TRIALS = 300
Noise = Callable[[np.random.Generator, int], Samples]


def lognormal(rng: np.random.Generator, size: int) -> Samples:
    return 100 * np.exp(rng.normal(0, 0.1, size))


def two_modes(rng: np.random.Generator, size: int) -> Samples:
    return np.where(rng.random(size) < 0.3, 150, 100) * np.exp(rng.normal(0, 0.02, size))


def heavy_tail(rng: np.random.Generator, size: int) -> Samples:
    return 100 * (1 + 0.1 * np.abs(rng.standard_t(1.5, size)))


def coarse_clock(rng: np.random.Generator, size: int) -> Samples:
    return np.round(100 + rng.normal(0, 3, size))


def drifting(rng: np.random.Generator, size: int) -> Samples:
    steps, level = rng.normal(0, 0.1, size), 0.0
    for index, step in enumerate(steps):
        level = steps[index] = 0.5 * level + step
    return 100 * np.exp(steps)


def pair(old: Samples, new: Samples) -> Pair:
    return Pair((old,), new)


def holds(change: Change, true: float) -> bool:
    """Whether the interval of a change holds the true one; an unbounded interval holds any."""
    return change.interval is None or change.interval[0] <= true <= change.interval[1]


@pytest.mark.parametrize("noise", [lognormal, two_modes, heavy_tail, coarse_clock, drifting])
@pytest.mark.parametrize(("old", "new", "cases"), [(40, 40, 1), (200, 50, 1), (20, 20, 10)])
def test_noise_is_rarely_called_slower_and_the_detectable_shift_is_found(
    noise: Noise, old: int, new: int, cases: int
) -> None:
    rng = np.random.default_rng([old, new, cases])
    alarms = found = asked = missed = 0
    for _ in range(TRIALS):
        quiet = judge_change([pair(noise(rng, old), noise(rng, new)) for _ in range(cases)], ALPHA)
        alarms += quiet.slower
        missed += not holds(quiet, 0)
        if quiet.detectable is not None:
            shift = 1 + quiet.detectable
            asked += 1
            moved = [pair(noise(rng, old), shift * noise(rng, new)) for _ in range(cases)]
            found += judge_change(moved, ALPHA).slower
    assert asked > TRIALS / 3
    assert found >= POWER * asked - 3 * np.sqrt(asked * POWER * (1 - POWER))
    outside = 1 - CONFIDENCE
    assert missed <= outside * TRIALS * (2 if noise is drifting else 1) + 3 * np.sqrt(outside * TRIALS)
    # drifting noise is autocorrelated, which a series of this length shows only roughly: twice the bound
    assert alarms <= ALPHA * TRIALS * (2 if noise is drifting else 1) + 3 * np.sqrt(ALPHA * TRIALS)


@pytest.mark.parametrize("size", [10, 12, 20])
def test_p_value_of_separated_samples_is_not_below_the_exact_one(size: int) -> None:
    old, new = np.arange(1.0, size + 1), np.arange(size + 1.0, 2 * size + 1)
    rng = np.random.default_rng(size)
    change = judge_change([pair(rng.permutation(old), rng.permutation(new))], ALPHA)
    assert change.p_slower >= 1 / comb(2 * size, size)
    assert change.slower


@given(scale=st.floats(1e-3, 1e6), seed=st.integers(0, 1000))
def test_comparison_is_invariant_under_the_unit_of_time(scale: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    old, new = lognormal(rng, 30), lognormal(rng, 30) * 1.3
    here, there = (judge_change([pair(old * by, new * by)], ALPHA) for by in (1.0, scale))
    assert (here.slower, here.faster) == (there.slower, there.faster)
    assert here.change == pytest.approx(there.change)
    assert here.detectable == pytest.approx(there.detectable)


def test_swapping_old_and_new_swaps_slower_and_faster() -> None:
    rng = np.random.default_rng(1)
    old, new = lognormal(rng, 50), lognormal(rng, 50) * 1.5
    there, back = judge_change([pair(old, new)], ALPHA), judge_change([pair(new, old)], ALPHA)
    assert (there.slower, there.faster, back.slower, back.faster) == (True, False, False, True)
    assert there.change == pytest.approx(0.5, abs=0.1)


def test_detectable_shift_grows_with_the_noise() -> None:
    rng = np.random.default_rng(2)
    detectable = [
        judge_change([pair(np.exp(rng.normal(0, spread, 50)), np.exp(rng.normal(0, spread, 50)))], ALPHA).detectable
        for spread in (0.01, 0.1, 0.5)
    ]
    assert all(one is not None for one in detectable)
    assert detectable[0] * 5 < detectable[1] < detectable[2] / 3  # type: ignore[operator]


def test_constant_samples_are_judged_neither_slower_nor_faster() -> None:
    change = judge_change([pair(np.full(20, 5.0), np.full(20, 5.0))], ALPHA)
    assert (change.slower, change.faster) == (False, False)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), 1e308])
def test_time_that_no_run_took_is_refused(value: float) -> None:
    with pytest.raises(ValueError, match="negative, not finite or longer than 30 years"):
        readable([1.0, value])


def test_changes_between_the_least_and_the_longest_time_are_finite() -> None:
    least, longest = readable([0.0] * 20), readable([LONGEST_US] * 20)
    for before, new in ((least, longest), (longest, least)):
        change = judge_change([pair(before, new)], ALPHA)
        assert math.isfinite(change.change)
        assert all(map(math.isfinite, change.interval or ()))


def test_interval_surrounds_the_change_and_narrows_with_more_samples() -> None:
    rng = np.random.default_rng(3)
    widths = []
    for size in (20, 200, 2000):
        found = judge_change([pair(lognormal(rng, size), 1.2 * lognormal(rng, size))], ALPHA)
        assert found.interval is not None
        assert found.interval[0] < found.change < found.interval[1]
        assert holds(found, 0.2)
        widths.append(found.interval[1] - found.interval[0])
    assert widths[0] > 2 * widths[1] > 4 * widths[2]


def test_error_of_summed_medians_adds_the_squares_and_needs_samples_of_each() -> None:
    rng = np.random.default_rng(4)
    one = lognormal(rng, 50)
    alone = summed_error([one])
    assert alone is not None
    assert summed_error([one] * 4) == pytest.approx(2 * alone)
    assert summed_error([one, one[:5]]) is None
