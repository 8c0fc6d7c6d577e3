"""Chance of a rank: against every order in which a token can draw its experts."""

from __future__ import annotations

import math
from itertools import permutations
from typing import Any

import numpy as np
import pytest

from distbench.tools.advise.hits import HitChances, Placement, fitting_weights, hit_chances, inclusions, round_robin


def by_every_order(weights: list[float], topk: int, placement: Placement) -> list[float]:
    """Chances by enumeration of all ordered draws; a replicated expert goes to each of its slots alike often."""
    slots = placement.experts.reshape(placement.ep_size, -1)
    share = np.array([[(row == expert).sum() for expert in range(len(weights))] for row in slots]) / placement.replicas
    missed = np.zeros(placement.ep_size)
    for order in permutations(range(len(weights)), topk):
        left, chance = sum(weights), 1.0
        for expert in order:
            chance *= weights[expert] / left
            left -= weights[expert]
        missed += chance * np.prod(1 - share[:, list(order)], axis=1)
    return [1 - one for one in missed]


@pytest.mark.parametrize("topk", [1, 2, 3, 6])
@pytest.mark.parametrize(
    "placement",
    [
        round_robin(6, 6, 3),
        round_robin(6, 9, 3),
        round_robin(6, 12, 12),
        Placement(np.array([0, 0, 1, 2, 3, 4, 5, 0]), 2, 6),
    ],
    ids=["plain", "three replicated", "one slot a rank", "both slots of a rank hold one expert"],
)
def test_chance_is_that_of_all_ordered_draws(topk: int, placement: Placement) -> None:
    for weights in ([1.0] * 6, [5.0, 1.0, 0.1, 2.0, 1.0, 1e-4], [1.0, 1.0, 1.0, 1.0, 1.0, 3.0]):
        found = hit_chances(np.array(weights), topk, placement)
        assert found.chances[found.group].tolist() == pytest.approx(by_every_order(weights, topk, placement), abs=1e-9)


@pytest.mark.parametrize("topk", [1, 3, 6])
def test_inclusions_are_those_of_all_ordered_draws_and_weights_are_fitted_to_them(topk: int) -> None:
    weights = [5.0, 1.0, 0.1, 2.0, 1.0, 1e-4]
    chances = by_every_order(weights, topk, round_robin(6, 6, 6))
    assert inclusions(np.array(weights), topk).tolist() == pytest.approx(chances, abs=1e-9)
    if topk < 6:
        fitted = fitting_weights(np.array(chances), topk)
        assert inclusions(fitted, topk).tolist() == pytest.approx(chances, rel=1e-4)


def test_uniform_chance_is_a_ratio_of_combinations_and_ranks_alike_are_one_group() -> None:
    found = hit_chances(np.ones(256), 8, round_robin(256, 256, 16))
    assert found.chances.tolist() == [pytest.approx(1 - math.comb(240, 8) / math.comb(256, 8), rel=1e-12)]
    assert found.sizes.tolist() == [16]
    many = hit_chances(np.ones(256), 8, round_robin(256, 16384, 16384))
    assert many.chances.tolist() == [pytest.approx(8 / 16384, rel=1e-9)]


def test_weights_of_many_orders_of_magnitude_keep_their_chances() -> None:
    weights = np.array([(place + 1.0) ** -8 for place in range(64)])
    found = hit_chances(weights, 4, round_robin(64, 64, 64))
    chances = found.chances[found.group]
    assert chances.sum() == pytest.approx(4, abs=1e-9)
    assert (np.diff(chances) < 0).all()


def test_layers_with_the_same_weights_in_another_order_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    def counted(*given: Any) -> Any:
        shares = given[2]
        calls.append(len(shares))
        return np.full(len(shares), 0.5)

    monkeypatch.setattr("distbench.tools.advise.hits._missed", counted)
    chances = HitChances(2, round_robin(4, 4, 4))
    chances.of(np.array([1.0, 2.0, 3.0, 4.0]))
    found = chances.of(np.array([4.0, 3.0, 2.0, 1.0]))
    assert (calls, found.group.tolist()) == ([4], [0, 1, 2, 3])
