"""Errors beside the ideal's on ranks: what is left out, what quantises on its way, who has no token."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.pipeline.run_case import run_case
from distbench.verify.records import ArmError, Outcome
from tests.cases import tiny_case
from tests.distributed.test_both import run_damaged
from tests.ranks import on_ranks

RANKS = 2


def gaussian_case(**values: Any) -> Case:
    return tiny_case(RANKS, **{"numerics": "gaussian", "require": "tolerance", "tokens": (37, 21)} | values)


def outcome_of(case: Case) -> Outcome:
    found: Outcome = on_ranks(RANKS, run_case, case)[0]
    return found


def errors_of(outcome: Outcome) -> list[ArmError]:
    assert outcome.gathered is not None
    return [error for record in outcome.gathered.observations for error in record.errors]


def codes(outcome: Outcome) -> set[str]:
    return {reason.code for reason in outcome.judgement.reasons}


def test_rows_lost_to_a_short_limit_are_left_out() -> None:
    outcome = outcome_of(gaussian_case(limit="max-recv-3", policy="unchecked"))
    assert outcome.judgement.verdict.value == "UNDER_LIMIT"
    errors = errors_of(outcome)
    assert {error.arm for error in errors} >= {"padded", "truncated"}
    assert all(error.within for error in errors), errors
    rows = {arm: sum(one.rows for one in errors if (one.arm, one.stage) == (arm, "experts")) for arm in ARMS}
    assert rows["truncated"] < rows["padded"]


def test_rows_that_arrived_wrong_are_left_out_so_that_the_experts_answer_for_the_others() -> None:
    arrived = "mutant:name=one-row-of-another-token,rank=1"
    outcome = outcome_of(gaussian_case(inject=arrived))
    assert {(one.stage, *one.ranks) for one in outcome.diagnosis} == {("dispatch", 1)}
    assert all(error.within for error in errors_of(outcome) if error.stage == "experts")
    outcome = outcome_of(gaussian_case(inject=f"{arrived};mutant:name=gelu-for-silu,rank=1"))
    assert {(one.stage, *one.ranks) for one in outcome.diagnosis} == {("", 1), ("dispatch", 1), ("experts", 1)}


ARMS = ("padded", "truncated")


def scaled(rows: Tensor) -> None:
    rows *= 1 + 2.0**-6


def damaged_in_truncated(session: Session, case: Case) -> Outcome | None:
    return run_damaged(session, case, scaled, range(3, 4))


def test_survivors_of_a_short_limit_that_are_wrong_are_corrupt() -> None:
    found: Outcome = on_ranks(RANKS, damaged_in_truncated, gaussian_case(limit="max-recv-3", policy="unchecked"))[0]
    assert found.judgement.verdict.value == "CORRUPT"
    assert "error" in codes(found)


MORI = {"transport": "mori", "experts": "reference", "emulate": True}


@pytest.mark.parametrize("quant", ["fp8_direct_cast", "fp8_blockwise", "fp4_blockwise"])
def test_quantised_combine_is_within_its_ideal(quant: str) -> None:
    outcome = outcome_of(gaussian_case(**MORI, combine_quant=quant))
    assert outcome.judgement.verdict.value == "PASS", outcome.judgement.reasons
    errors = [error for error in errors_of(outcome) if error.stage == "combine"]
    assert errors
    assert all(error.ratio is not None and 0.9 <= error.ratio <= 1.1 for error in errors), errors


def test_fp8_of_the_stand_in_for_aiter_is_within_its_ideal() -> None:
    values = {"experts": "aiter", "emulate": True, "dispatch_dtype": "fp8", "hidden_size": 512}
    outcome = outcome_of(gaussian_case(**values, intermediate_size=256))
    assert outcome.judgement.verdict.value == "PASS", outcome.judgement.reasons
    assert {error.family.split(" ")[0] for error in errors_of(outcome)} == {"e4m3fnuz"}


@pytest.mark.parametrize("tokens", [(0, 21), (0, 0), (1, 0)])
def test_ranks_without_tokens_are_measured_by_the_rows_of_others(tokens: tuple[int, ...]) -> None:
    outcome = outcome_of(gaussian_case(tokens=tokens))
    assert outcome.judgement.verdict.value == "PASS", outcome.judgement.reasons
    assert bool(errors_of(outcome)) == any(tokens)


@pytest.mark.parametrize("routing", ["duplicates", "local", "hot-rank:0"])
def test_doubled_and_absent_routes_are_within_the_ideal(routing: str) -> None:
    outcome = outcome_of(gaussian_case(routing=routing))
    assert outcome.judgement.verdict.value == "PASS", outcome.judgement.reasons
    assert all(error.within for error in errors_of(outcome))


def test_one_column_and_eight_routes_are_within_the_ideal() -> None:
    """The relative distance of two right arms may be any here: outputs cancel, and there is but one of a token."""
    values = {"hidden_size": 1, "intermediate_size": 128, "topk": 8, "num_experts": 8, "tokens": (1, 1)}
    for seed in range(6):
        outcome = outcome_of(gaussian_case(**values, limit="max-recv", seed=seed))
        assert outcome.judgement.verdict.value == "PASS", (seed, outcome.judgement.reasons)


def one_token(rows: Tensor) -> None:
    """Damage the last row by a tenth of its largest value."""
    if len(rows):
        rows[-1, 0] += 0.25 * rows[-1].float().abs().amax().to(torch.bfloat16)


def damaged_token(session: Session, case: Case) -> Outcome | None:
    return run_damaged(session, case, one_token, range(1, 4))


def test_far_token_outside_the_sample_is_measured() -> None:
    """More tokens than a CPU samples: what is far from the padded arm's is measured whether or not it was sampled."""
    tokens = (200, 200)
    case = gaussian_case(tokens=tokens, max_dispatch_tokens_per_rank=256)
    for seed in range(2):
        found: Outcome = on_ranks(RANKS, damaged_token, case_with(case, seed))[0]
        assert found.judgement.verdict.value == "CORRUPT"
        assert "error" in codes(found)


def case_with(case: Case, seed: int) -> Case:
    return gaussian_case(tokens=case.tokens, max_dispatch_tokens_per_rank=256, seed=seed)
