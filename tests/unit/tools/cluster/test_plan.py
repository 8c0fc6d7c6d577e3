"""Every pair meets once, and no node is in two pairs of a round."""

from __future__ import annotations

from itertools import combinations

import pytest

from distbench.tools.cluster.plan import pair_rounds, rounds_of


@pytest.mark.parametrize("count", [0, 1, 2, 3, 4, 5, 8, 9, 64, 129])
def test_each_pair_meets_once_in_the_least_number_of_rounds(count: int) -> None:
    nodes = [f"node{number}" for number in range(count)]
    rounds = pair_rounds(nodes)
    met = [frozenset(pair) for one in rounds for pair in one]
    assert len(met) == len(set(met))
    assert set(met) == {frozenset(pair) for pair in combinations(nodes, 2)}
    assert all(len({node for pair in one for node in pair}) == 2 * len(one) for one in rounds)
    assert len(rounds) == (0 if count < 2 else count - 1 + count % 2)


def test_steps_nodes_and_all_have_one_round_each() -> None:
    assert rounds_of("nodes", ["a", "b"]) == [[("a",), ("b",)]]
    assert rounds_of("all", ["a", "b"]) == [[("a", "b")]]
    assert rounds_of("all", ["a"]) == rounds_of("pairs", ["a"]) == rounds_of("nodes", []) == []
