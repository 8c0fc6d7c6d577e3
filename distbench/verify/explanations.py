"""Who may have made a sum wrong: what each explanation would have made of it, and which few explain all ranks' tokens.

An explanation is a change of all that one rank returned, or that a rank added nothing but its own rows. It explains a
wrong token if it makes it what it is, and is out of question where it would have changed one that is right.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.verify.sums import Contributions, SumOrder, added
from distbench.workload.quantize import saturated

Same = Callable[[Tensor, Tensor], Tensor]
"""Whether rows [n, H] are as good as others: bool [n]."""


class Explanation(NamedTuple):
    """What became of rows, and the rank that is to blame: the one that returned them, or for ALONE that added them."""

    what: str
    rank: int


Alternatives = tuple[Explanation, ...]
"""Explanations of the very same tokens, which nothing tells apart."""


CHANGES: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "a rank's share is missing": lambda rows, _: torch.zeros_like(rows),
    "a rank's share counts twice": lambda rows, _: rows * 2,
    "a rank's share was cast to fp8 without a scale": lambda rows, fp8: saturated(rows.float(), fp8).to(rows.dtype),
}
"""What became of rows, by the device's fp8 type."""
ALONE = "only the rank's own experts contributed"
_KINDS = (*CHANGES, ALONE)


def changed(
    contributions: Contributions, explanations: Sequence[Explanation], rank: int, fp8: torch.dtype
) -> Contributions:
    """Return what `rank` would have added if all of the explanations held, on devices of that `fp8` type."""
    rows, ranks = contributions
    for one in explanations:
        if one.what == ALONE and one.rank == rank:
            rows = torch.where((ranks == rank).unsqueeze(2), rows, torch.zeros_like(rows))
        elif one.what != ALONE:
            rows = torch.where((ranks == one.rank).unsqueeze(2), CHANGES[one.what](rows, fp8), rows)
    return Contributions(rows, ranks)


def effects(
    contributions: Contributions, rank: int, order: SumOrder, fp8: torch.dtype, holds: Callable[[Tensor], Tensor]
) -> Tensor:
    """Return, for tokens of `rank`, whom each explanation blames where `holds` says so of the sum it makes, else -1.

    int64 [n, x]: a column for each change of the contribution in each place, and one for ALONE. `holds` takes sums
    [n, H] and returns bool [n].
    """
    rows, ranks = contributions
    columns = []
    for change in CHANGES.values():
        for place in range(ranks.shape[1]):
            other = rows.clone()
            other[:, place] = change(rows[:, place], fp8)
            found = holds(added(Contributions(other, ranks), order)) & (ranks[:, place] >= 0)
            columns.append(torch.where(found, ranks[:, place], -1))
    alone = holds(added(changed(contributions, [Explanation(ALONE, rank)], rank, fp8), order))
    columns.append(torch.where(alone, rank, -1))
    return torch.stack(columns, dim=1)


def choose(explaining: Sequence[list[list[int]]], spared: Sequence[list[list[int]]]) -> list[Alternatives]:
    """Return few explanations that explain all tokens that any explains, that of the most tokens first.

    Of each rank: `effects` of its wrong tokens, of those that explain them, and of its right ones, of those that would
    have changed them.
    """
    tokens: dict[Explanation, set[tuple[int, int]]] = defaultdict(set)
    for owner, table in enumerate(explaining):
        for token, row in enumerate(table):
            for one in _explanations(row):
                tokens[one].add((owner, token))
    for table in spared:
        for row in table:
            for one in _explanations(row):
                tokens.pop(one, None)
    left = set().union(*tokens.values())
    chosen: list[Alternatives] = []
    while left:
        best = max(tokens, key=lambda one: len(tokens[one] & left))
        explained = tokens[best] & left
        chosen.append(tuple(one for one in tokens if tokens[one] & left == explained))
        left -= explained
    return chosen


def explained_by(row: Sequence[int], alternatives: Alternatives) -> bool:
    """Whether a token, by its row of `effects`, is explained by one of them."""
    return not set(_explanations(row)).isdisjoint(alternatives)


def _explanations(row: Sequence[int]) -> list[Explanation]:
    places = (len(row) - 1) // len(CHANGES)
    return [Explanation(_KINDS[column // places], rank) for column, rank in enumerate(row) if rank >= 0]
