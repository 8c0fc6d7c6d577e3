"""Chance that a step exceeds a limit: above every exact tail, above what is simulated, and not far above."""

from __future__ import annotations

import math
import runpy
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench.tools.advise.chance import (
    MARGIN,
    Batch,
    Traffic,
    chance_above,
    fullest_law,
    fullest_place,
    smallest_limit,
    tail_bounds,
    traffic_of,
)
from distbench.tools.advise.hits import Groups, hit_chances, round_robin

SCRIPT = Path(__file__).parents[4] / "scripts" / "simulate_chance.py"
STEPS = 20_000


def exact_tail(least: int, tokens: int, chance: float) -> float:
    q = Fraction(chance)
    terms = (math.comb(tokens, rows) * q**rows * (1 - q) ** (tokens - rows) for rows in range(least, tokens + 1))
    return float(sum(terms, Fraction(0)))


def groups(*chances: float) -> Groups:
    return Groups(np.array(chances), np.arange(len(chances)))


def traffic(*chances: float, tokens: int = 40, most: int = 10, own: int = 0, layers: int = 1) -> Traffic:
    return traffic_of([groups(*chances)] * layers, [Batch(tokens, most, 1.0)], own)


@pytest.mark.parametrize("chance", [1e-6, 0.1, 0.5, 0.97])
def test_tail_bound_is_above_the_exact_tail_and_close_far_out(chance: float) -> None:
    for least in range(1, 41):
        exact, bound = exact_tail(least, 40, chance), float(tail_bounds(least, 40, np.array([chance]))[0])
        assert bound >= exact * (1 - 1e-9)
        if exact < 1e-2:
            assert bound <= 1.5 * exact


def test_certain_and_impossible_ranks_have_the_chances_1_and_0() -> None:
    assert tail_bounds(40, 40, np.array([1.0, 0.0])).tolist() == [1.0, 0.0]
    assert chance_above(39, traffic(1.0, 0.0)).independent == 1
    assert chance_above(40, traffic(1.0, 0.0)) == (0, 0)


def test_chance_is_the_margin_times_the_sum_over_ranks_and_layers_and_markovs_bound_for_any_joint_choice() -> None:
    one, many = chance_above(25, traffic(0.2)), chance_above(25, traffic(0.2, 0.2, layers=3))
    assert many.independent == pytest.approx(6 * one.independent)
    assert one.independent == pytest.approx(MARGIN * float(tail_bounds(26, 40, np.array([0.2]))[0]))
    assert one.any_joint == pytest.approx(40 * 0.2 / 26)
    assert chance_above(5, traffic(0.2, layers=61)).any_joint == 1


def test_own_rows_of_a_shared_expert_are_received_for_certain() -> None:
    shared = traffic(0.2, own=1)
    assert chance_above(9, shared) == (1, 1)
    assert chance_above(20, shared).independent == pytest.approx(MARGIN * tail_bounds(11, 30, np.array([0.2]))[0])
    assert fullest_law(shared, shared.batches[0]).first >= 10


def test_steps_of_several_sizes_count_by_their_shares() -> None:
    small, large = Batch(10, 5, 0.75), Batch(40, 10, 0.25)
    both = traffic_of([groups(0.3)], [small, large])
    alone = traffic_of([groups(0.3)], [large._replace(share=1.0)])
    assert chance_above(20, both).independent == pytest.approx(0.25 * chance_above(20, alone).independent)


def test_smallest_limit_is_the_first_with_the_target_chance() -> None:
    here = traffic(0.2, 0.3, layers=4)
    limit = smallest_limit(1e-6, here)
    assert chance_above(limit, here).independent <= 1e-6 < chance_above(limit - 1, here).independent


def test_law_of_the_fullest_rank_is_the_product_of_the_ranks_laws() -> None:
    here = traffic(0.2, 0.4, layers=2)
    law = fullest_law(here, here.batches[0])
    for rows in (15, 20, 25):
        below = [(1 - exact_tail(rows + 1, 40, chance)) ** 2 for chance in (0.2, 0.4)]
        assert law.below[rows - law.first] == pytest.approx(math.prod(below), rel=1e-9)
    assert law.below[-1] == pytest.approx(1)
    assert fullest_place(here, here.batches[0], 30) == (0, 1)


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(SCRIPT), run_name="simulate_chance")


@pytest.mark.parametrize("name", ["uniform", "zipf 1.2", "one hot rank"])
def test_chance_is_not_below_simulated_steps_and_at_most_10_times_as_high(script: dict[str, Any], name: str) -> None:
    experts, ranks, topk, tokens = script["EXPERTS"], script["RANKS"], script["TOPK"], 32
    weights = script["routings"]()[name]
    counts = script["fullest_rows"](weights, (topk, ranks), tokens, STEPS, 3)
    found = hit_chances(weights, topk, round_robin(experts, experts, ranks))
    here = traffic_of([found], [Batch(tokens, tokens // ranks, 1.0)])
    above = STEPS - np.cumsum(counts)
    limits = np.flatnonzero((above >= 50) & (above <= STEPS / 10))
    assert len(limits) > 0
    for limit in limits:
        told = chance_above(int(limit), here).independent * STEPS
        assert above[limit] <= told <= 10 * above[limit]
