"""Fewest explanations for the wrong tokens of all ranks; none that a correct token contradicts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distbench.transport.sum_order import SumOrder
from distbench.verify.combine_blame import ALONE, CHANGES, Explanation, changed, choose, effects
from distbench.verify.combine_model import Contributions, added

MISSING, DOUBLED, CAST = CHANGES
OCP, FNUZ = torch.float8_e4m3fn, torch.float8_e4m3fnuz
# A token has two places; columns: missing, missing, doubled, doubled, cast, cast, alone.
NOBODY = [-1] * 7


def row(**columns: int) -> list[int]:
    """Row of `effects`: the rank that each given column blames."""
    names = ("missing0", "missing1", "doubled0", "doubled1", "cast0", "cast1", "alone")
    return [columns.get(name, -1) for name in names]


def test_one_sender_explains_the_tokens_of_all_ranks() -> None:
    first = [row(missing1=1, alone=0), row(missing1=1, alone=0)]
    second = [row(missing0=1)]
    assert choose([first, second], [[], []]) == [(Explanation(MISSING, 1),)]


def test_correct_token_excludes_an_explanation_that_would_change_it() -> None:
    wrong = [row(missing1=1, alone=0)]
    assert choose([wrong, []], [[], [row(missing0=1)]]) == [(Explanation(ALONE, 0),)]


def test_indistinguishable_explanations_are_all_kept() -> None:
    wrong = [row(missing0=2, missing1=3)]
    assert choose([wrong], [[]]) == [(Explanation(MISSING, 2), Explanation(MISSING, 3))]


def test_two_faulty_senders_are_both_named() -> None:
    found = choose([[row(missing0=1), row(missing0=1), row(doubled1=2)]], [[]])
    assert found == [(Explanation(MISSING, 1),), (Explanation(DOUBLED, 2),)]


def test_unexplained_or_absent_tokens_give_no_explanation() -> None:
    assert choose([[NOBODY], []], [[], [NOBODY]]) == []


def contributions() -> Contributions:
    rows = torch.tensor([[[1.0, 500.0], [2.0, 3.0]], [[4.0, 5.0], [0.0, 0.0]]]).bfloat16()
    return Contributions(rows, torch.tensor([[2, 0], [1, -1]]))


def equals(expected: list[list[float]]) -> Callable[[Tensor], Tensor]:
    return lambda sums: (sums == torch.tensor(expected).bfloat16()).all(1)


def test_effects_name_the_rank_whose_contribution_explains_the_sum() -> None:
    order = SumOrder()
    missing_2 = effects(contributions(), 0, order, OCP, equals([[2.0, 3.0], [0.0, 0.0]]))
    assert missing_2.tolist() == [[2, -1, -1, -1, -1, -1, 0], [1, -1, -1, -1, -1, -1, 0]]
    doubled_0 = effects(contributions(), 3, order, OCP, equals([[5.0, 506.0], [8.0, 10.0]]))
    assert doubled_0.tolist() == [[-1, -1, -1, 0, -1, -1, -1], [-1, -1, 1, -1, -1, -1, -1]]
    cast_2 = effects(contributions(), 3, order, OCP, equals([[3.0, 451.0], [-1.0, 0.0]]))
    assert cast_2.tolist() == [[-1, -1, -1, -1, 2, -1, -1], NOBODY]


def test_cast_effect_saturates_at_the_largest_fp8_value_of_the_device() -> None:
    cast = [[3.0, 243.0], [-1.0, 0.0]]
    blamed = [[-1, -1, -1, -1, 2, -1, -1], NOBODY]
    assert effects(contributions(), 3, SumOrder(), FNUZ, equals(cast)).tolist() == blamed
    assert effects(contributions(), 3, SumOrder(), OCP, equals(cast)).tolist() == [NOBODY, NOBODY]


def test_several_explanations_are_applied_together() -> None:
    both = changed(contributions(), [Explanation(MISSING, 0), Explanation(DOUBLED, 1), Explanation(ALONE, 3)], 2, OCP)
    assert torch.equal(added(both, SumOrder()), torch.tensor([[1.0, 500.0], [8.0, 10.0]]).bfloat16())
    alone = changed(contributions(), [Explanation(ALONE, 1)], 1, OCP)
    assert torch.equal(added(alone, SumOrder()), torch.tensor([[0.0, 0.0], [4.0, 5.0]]).bfloat16())
