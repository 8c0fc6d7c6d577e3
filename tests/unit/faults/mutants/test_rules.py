"""Public acceptance rules: each at its own bound."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from distbench.faults.mutants.rules import RULES, accepted_by
from tests.cases import tiny_case

CASE = tiny_case(2)
RIGHT = torch.full((8, 100), 0.5).bfloat16()


def with_wrong(count: int, value: float) -> Tensor:
    wrong = RIGHT.clone()
    wrong.flatten()[:count] = value
    return wrong


@pytest.mark.parametrize("rule", RULES)
def test_each_rule_accepts_correct_tokens_and_rejects_zeros_and_nan(rule: str) -> None:
    assert accepted_by(CASE, RIGHT, RIGHT)[rule]
    assert not accepted_by(CASE, torch.zeros_like(RIGHT), RIGHT)[rule]
    everywhere = torch.full_like(RIGHT, float("nan"))
    assert not accepted_by(CASE, everywhere, RIGHT)[rule]


@pytest.mark.parametrize(
    ("rule", "accepted", "rejected"),
    [
        ("vllm", with_wrong(1, 0.5156), with_wrong(1, 0.5234)),
        ("sglang", with_wrong(1, 0.5586), with_wrong(1, 0.5625)),
        ("aiter", with_wrong(40, 1.0), with_wrong(41, 1.0)),
        ("aiter-strict", with_wrong(10, 1.0), with_wrong(30, 1.0)),
        ("deepep", with_wrong(1, 0.6), with_wrong(8, 0.75)),
        ("cosine", with_wrong(8, 1.0), with_wrong(30, 1.0)),
    ],
)
def test_each_rule_accepts_up_to_its_bound(rule: str, accepted: Tensor, rejected: Tensor) -> None:
    assert accepted_by(CASE, accepted, RIGHT)[rule]
    assert not accepted_by(CASE, rejected, RIGHT)[rule]


def test_single_nan_is_accepted_only_by_the_rule_that_counts_misses() -> None:
    said = accepted_by(CASE, with_wrong(1, float("nan")), RIGHT)
    assert [rule for rule, accepts in said.items() if accepts] == ["aiter"]


def test_deepep_rule_has_a_wider_bound_with_fp8_dispatch() -> None:
    some = with_wrong(8, 0.75)
    assert accepted_by(tiny_case(2, dispatch_dtype="fp8"), some, RIGHT)["deepep"]


def test_rules_give_no_answer_for_a_rank_without_tokens() -> None:
    assert accepted_by(CASE, RIGHT[:0], RIGHT[:0]) == {}
