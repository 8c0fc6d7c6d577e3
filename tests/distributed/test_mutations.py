"""Damage at any boundary on any rank: the verdict is never PASS, and the first wrong stage, arm and rank are named."""

from __future__ import annotations

import pytest

from distbench.errors import Verdict
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.distributed.faults import (
    ARM_CALLS,
    FAULTS,
    run_with_fault,
    run_with_foreign_ids_in_combine,
    run_with_weights_of_another_expert,
)
from tests.ranks import on_ranks

RANK = 2
CASES = {
    "bf16": tiny_case(),
    "fp8": tiny_case(dispatch_dtype="fp8"),
    "fp8 of gfx942": tiny_case(dispatch_dtype="fp8", fp8_format="e4m3fnuz"),
    "digests": tiny_case(gather="digests", slot_order="source"),
}
SINGLE_FAULTS = [(stage, fault) for stage, faults in FAULTS.items() for fault in faults]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(("stage", "fault"), SINGLE_FAULTS)
def test_every_fault_is_caught_with_its_stage_and_rank(stage: str, fault: str, name: str) -> None:
    arm = ARM_CALLS[SINGLE_FAULTS.index((stage, fault)) % len(ARM_CALLS)]
    outcome: Outcome = on_ranks(4, run_with_fault, CASES[name], stage, fault, arm, RANK)[0]
    first = outcome.judgement.first_divergence
    assert outcome.judgement.verdict is (Verdict.BASELINE_WRONG if arm == "padded" else Verdict.CORRUPT)
    assert first is not None
    assert (first.arm, first.rank) == (arm, RANK)
    assert first.stage == stage


@pytest.mark.parametrize("arm", ARM_CALLS)
@pytest.mark.parametrize("rank", [0, 3])
def test_fault_in_any_arm_on_any_rank_is_caught(arm: str, rank: int) -> None:
    for stage, fault in (
        ("dispatch", "flip the lowest bit of a received element"),
        ("experts", "flip the lowest bit of a result"),
        ("combine", "flip the lowest bit of a token"),
    ):
        outcome: Outcome = on_ranks(4, run_with_fault, CASES["bf16"], stage, fault, arm, rank)[0]
        first = outcome.judgement.first_divergence
        assert first is not None
        assert (first.stage, first.arm, first.rank) == (stage, arm, rank)
        assert outcome.judgement.verdict is not Verdict.PASS


@pytest.mark.parametrize("stage", FAULTS)
def test_fault_in_gaussian_inputs_is_caught(stage: str) -> None:
    case = tiny_case(numerics="gaussian", kernel_table="tests/data/splitk.csv", routing="duplicates")
    for fault in FAULTS[stage][:2]:
        outcome: Outcome = on_ranks(4, run_with_fault, case, stage, fault, "truncated", RANK)[0]
        if stage == "dispatch":
            assert outcome.judgement.verdict is Verdict.CORRUPT
        else:
            assert outcome.judgement.verdict in (Verdict.CORRUPT, Verdict.DRIFT)


def test_weights_of_another_expert_are_baseline_wrong() -> None:
    outcome: Outcome = on_ranks(4, run_with_weights_of_another_expert, CASES["bf16"], RANK)[0]
    first = outcome.judgement.first_divergence
    assert outcome.judgement.verdict is Verdict.BASELINE_WRONG
    assert first is not None
    assert (first.stage, first.rank) == ("experts", RANK)


def test_other_ids_of_the_right_shape_in_combine_are_baseline_wrong() -> None:
    outcome: Outcome = on_ranks(4, run_with_foreign_ids_in_combine, CASES["bf16"], RANK)[0]
    first = outcome.judgement.first_divergence
    assert outcome.judgement.verdict is Verdict.BASELINE_WRONG
    assert first is not None
    assert (first.stage, first.rank) == ("combine", RANK)
