"""Spread between launches of one version: it is no slowdown, and a real slowdown is found."""

from __future__ import annotations

import numpy as np
import pytest

from distbench.tools.compare.launches import judge_launches
from distbench.tools.compare.noise import ALPHA, CONFIDENCE, POWER, Pair, judge_change

TRIALS = 150
CASES = 4


def launches(rng: np.random.Generator, old: int, *, apart: float, shift: float = 1.0) -> list[Pair]:
    """Cases measured in `old` launches and a new one, each launch with its own level."""
    levels = np.exp(rng.normal(0, apart, old + 1))
    levels[-1] *= shift
    noise = rng.normal(0, 0.02, (CASES, old + 1, 25))
    base = 100 * np.exp(rng.normal(0, 1, CASES))
    series = base[:, None, None] * levels[:, None] * np.exp(noise)
    return [Pair(tuple(case[:-1]), case[-1]) for case in series]


@pytest.mark.parametrize("old", [3, 5, 10])
def test_launch_within_the_spread_is_rarely_called_slower_and_the_detectable_shift_is_found(old: int) -> None:
    rng = np.random.default_rng(old)
    alarms = found = missed = 0
    for _ in range(TRIALS):
        quiet = judge_launches(launches(rng, old, apart=0.03), ALPHA)
        alarms += quiet.slower
        assert quiet.interval is not None
        missed += not quiet.interval[0] <= 0 <= quiet.interval[1]
        assert quiet.detectable is not None
        state = rng.bit_generator.state
        bound = judge_launches(launches(rng, old, apart=0.03), ALPHA).detectable
        assert bound is not None
        rng.bit_generator.state = state
        found += judge_launches(launches(rng, old, apart=0.03, shift=1 + bound), ALPHA).slower
    assert missed <= (1 - CONFIDENCE) * TRIALS + 3 * np.sqrt((1 - CONFIDENCE) * TRIALS)
    assert alarms <= ALPHA * TRIALS + 3 * np.sqrt(ALPHA * TRIALS)
    assert found >= POWER * TRIALS - 3 * np.sqrt(TRIALS * POWER * (1 - POWER))


def test_single_old_launch_mistakes_launch_spread_for_a_slowdown() -> None:
    rng = np.random.default_rng(0)
    pairs = [launches(rng, 5, apart=0.03) for _ in range(100)]
    alone = sum(judge_change([Pair(one.old[:1], one.new) for one in case], ALPHA).slower for case in pairs)
    several = sum(judge_launches(case, ALPHA).slower for case in pairs)
    assert alone > 20
    assert several <= 4


def test_detectable_shift_shrinks_with_more_old_launches() -> None:
    rng = np.random.default_rng(1)
    bounds = [
        np.median([judge_launches(launches(rng, old, apart=0.03), ALPHA).detectable or 0.0 for _ in range(30)])
        for old in (3, 5, 10)
    ]
    assert bounds[0] > 1.2 * bounds[1] > 1.2**2 * bounds[2] > 0.1


def test_launches_without_spread_are_judged_by_their_own_noise() -> None:
    series = np.random.default_rng(2).permutation(np.linspace(99, 101, 30))
    same = judge_launches([Pair((series, series, series), series)], ALPHA)
    assert (same.slower, same.faster) == (False, False)
    assert judge_launches([Pair((series, series, series), series * 1.5)], ALPHA).slower
