"""Groups of nodes for each step, in rounds of groups that share no node."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

Step = Literal["nodes", "pairs", "all"]
STEPS: tuple[Step, ...] = ("nodes", "pairs", "all")

Group = tuple[str, ...]
Round = list[Group]


def rounds_of(step: Step, nodes: Sequence[str]) -> list[Round]:
    """Rounds of a step; the groups of a round run at the same time. Empty where nodes are too few."""
    if step == "nodes":
        return [[(node,) for node in nodes]] if nodes else []
    if step == "pairs":
        return pair_rounds(nodes)
    return [[tuple(nodes)]] if len(nodes) > 1 else []


def pair_rounds(nodes: Sequence[str]) -> list[Round]:
    """Rounds in which each pair of nodes meets once and each node is in at most one pair of a round.

    The round-robin tournament by the circle method: n - 1 rounds of n / 2 pairs; with an odd number of nodes n rounds,
    and a node sits out in each.
    """
    circle: list[str | None] = [*nodes, *([None] if len(nodes) % 2 else [])]
    rounds: list[Round] = []
    for _ in range(len(circle) - 1):
        half = len(circle) // 2
        facing = zip(circle[:half], reversed(circle[half:]), strict=True)
        rounds.append([(first, second) for first, second in facing if first is not None and second is not None])
        circle[1:] = [circle[-1], *circle[1:-1]]
    return [found for found in rounds if found]
