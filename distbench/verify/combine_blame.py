"""Attribution of wrong sums: the sum under each explanation, and few explanations for all ranks' tokens.

An explanation is a change of all rows that one rank returned, or that a rank added only its own rows. It explains a
wrong token if it yields the token's bits. It is rejected if it would change a right token.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.transport.sum_order import SumOrder
from distbench.verify.combine_model import Contributions, added
from distbench.workload.quantize import saturated

Same = Callable[[Tensor, Tensor], Tensor]
"""Predicate on rows [n, H] and reference rows: bool [n], whether each row is as good as its reference."""


class Explanation(NamedTuple):
    """A change of rows, and the rank to blame: the one that returned them, or for ALONE the one that added them."""

    what: str
    rank: int


Alternatives = tuple[Explanation, ...]
"""Indistinguishable explanations: they cover exactly the same tokens."""


CHANGES: dict[str, Callable[[Tensor, torch.dtype], Tensor]] = {
    "a rank's share is missing": lambda rows, _: torch.zeros_like(rows),
    "a rank's share counts twice": lambda rows, _: rows * 2,
    "a rank's share was cast to fp8 without a scale": lambda rows, fp8: saturated(rows.float(), fp8).to(rows.dtype),
}
"""Changes of rows, by the device's fp8 type."""
ALONE = "only the rank's own experts contributed"
_KINDS = (*CHANGES, ALONE)


def changed(
    contributions: Contributions, explanations: Sequence[Explanation], rank: int, fp8: torch.dtype
) -> Contributions:
    """Return the sum on `rank` if all of the explanations held, on devices of that `fp8` type."""
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
    """Return the rank that each explanation blames for tokens of `rank`, where its sum satisfies `holds`; else -1.

    int64 [n, x]: a column for each change of the contribution in each place, and one for ALONE. `holds` takes sums [n,
    H] and returns bool [n].
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
    """Return few explanations that cover all tokens that any explains, greedily: the one with the most tokens first.

    `explaining` has the `effects` of each rank's wrong tokens; `spared` those of its right tokens, which an explanation
    would have changed.
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
    """Whether one of the alternatives explains a token, given its row of `effects`."""
    return not set(_explanations(row)).isdisjoint(alternatives)


def _explanations(row: Sequence[int]) -> list[Explanation]:
    places = (len(row) - 1) // len(CHANGES)
    return [Explanation(_KINDS[column // places], rank) for column, rank in enumerate(row) if rank >= 0]
