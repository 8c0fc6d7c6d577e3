"""Blamed ranks and confidence of a diagnosis, and wrong stages with inputs that are not exact."""

from __future__ import annotations

import os
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbench.case.resolve import Layer, resolve_case
from distbench.case.spec import Case
from distbench.case.stages import LAYER_STAGES
from distbench.errors import Verdict
from distbench.faults.injector import FAULTS
from distbench.pipeline.run_case import run_case
from distbench.tools.selftest.cases import DEAD, random_keys
from distbench.verify.records import LISTED_TOKENS, Diagnosis, Outcome
from tests.cases import tiny_case
from tests.ranks import on_ranks

RANKS = 4
SOAK = os.environ.get("DISTBENCH_SOAK") == "1"
SPLIT_K = {"numerics": "gaussian", "kernel_table": "tests/data/splitk.csv", "routing": "duplicates", "tokens": 20}
ATOMIC = {"numerics": "gaussian", "tokens": 20}
PAIRED = [
    name for name, kind in FAULTS.items() if kind.verdict not in (*DEAD, Verdict.PASS.value) and not kind.transport
]


def outcome_of(case: Case) -> Outcome:
    outcome: Outcome = on_ranks(case.ep_size, run_case, case)[0]
    return outcome


def blame_of(outcome: Outcome) -> list[tuple[str, str, list[int]]]:
    return [(found.cause, found.confidence, found.ranks) for found in outcome.diagnosis if found.stage]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("fault", ["share-lost", "share-doubled", "communication-skipped"])
@pytest.mark.parametrize(("ranks", "routing"), [(2, "uniform"), (4, "duplicates"), (8, "uniform")])
def test_faulty_sender_and_faulty_owner_of_a_sum_are_distinguished(
    ranks: int, routing: str, fault: str, seed: int
) -> None:
    """With two ranks per token, a missing partial sum equals that of an owner that adds only its own."""
    case = tiny_case(ranks, seed=seed, tokens=12, routing=routing, inject=f"{fault}:rank={seed % ranks}")
    assert [(confidence, blamed) for _, confidence, blamed in blame_of(outcome_of(case))] == [
        ("certain", [seed % ranks])
    ]


@pytest.mark.parametrize("arm", ["padded", "truncated"])
@pytest.mark.parametrize("fault", ["sent-zeros", "sent-flip"])
@pytest.mark.parametrize(("ranks", "dtype"), [(2, "bf16"), (4, "fp8"), (8, "bf16")])
def test_rank_that_sends_wrong_rows_is_blamed_and_its_receivers_are_not(
    ranks: int, dtype: str, fault: str, arm: str
) -> None:
    inject = f"{fault}:rank={ranks - 1},arm={arm}"
    case = tiny_case(
        ranks, tokens=90, max_dispatch_tokens_per_rank=96, dispatch_dtype=dtype, limit="sum", inject=inject
    )
    outcome = outcome_of(case)
    ((cause, confidence, blamed),) = blame_of(outcome)
    assert (cause.split(": ")[0], cause.split(", ")[-1], confidence, blamed) == (
        "dispatch",
        "as sent",
        "certain",
        [ranks - 1],
    )
    assert outcome.gathered is not None
    found = [one for record in outcome.gathered.observations for one in record.divergences if one.stage == "dispatch"]
    assert max(len(one.evidence.received) for one in found) == min(max(one.rows for one in found), LISTED_TOKENS)


@pytest.mark.parametrize("seed", range(3))
def test_token_correct_on_another_rank_blames_the_receiver(seed: int) -> None:
    """Two ranks: most tokens go to both."""
    outcome = outcome_of(tiny_case(2, seed=seed, inject="flipped-bit:rank=1"))
    assert blame_of(outcome) == [("dispatch: single bits flipped", "certain", [1])]


def test_token_on_a_single_rank_gives_a_likely_blame_and_names_both_candidates() -> None:
    alone: dict[str, Any] = {"topk": 1, "seed": 1}
    outcome = outcome_of(tiny_case(RANKS, inject="flipped-bit:rank=3", **alone))
    assert blame_of(outcome) == [("dispatch: single bits flipped", "likely", [3])]
    (found,) = (one for one in outcome.diagnosis if one.stage)
    assert f"; or rank {found.tokens[0][0]} sent it wrong" in found.evidence
    several = outcome_of(tiny_case(RANKS, inject="overwritten-by-peer:rank=3", tokens=40, **alone))
    assert [(confidence, blamed) for _, confidence, blamed in blame_of(several)] == [("certain", [3])]
    sent = outcome_of(tiny_case(RANKS, inject="sent-zeros:rank=2", **alone))
    assert blame_of(sent) == [("dispatch: zeros, as sent", "likely", [2])]


def test_damage_in_different_repeats_gives_no_certain_blame_of_other_ranks() -> None:
    for seed in range(4):
        outcome = outcome_of(tiny_case(RANKS, seed=seed, repeats=3, inject="sent-flip:rank=2,arm=control"))
        assert [found for found in wrongly_blamed(outcome) if found.confidence == "certain"] == []


def test_damage_of_every_row_on_every_rank_gives_no_blame_of_senders() -> None:
    inject = ";".join(f"sent-zeros:rank={rank}" for rank in range(RANKS))
    assert [cause for cause, _, _ in blame_of(outcome_of(tiny_case(RANKS, inject=inject)))] == ["dispatch: zeros"]


@pytest.mark.parametrize(
    ("inject", "guilty"),
    [
        ("sent-flip:rank=3;share-lost:rank=1", [1, 3]),
        ("sent-zeros:rank=3;flipped-bit:rank=1;times-ep-size:rank=0", [0, 1, 3]),
        ("flipped-bit:rank=3;share-lost:rank=1", [1, 3]),
        ("share-lost:rank=0;share-lost:rank=1", [0, 1]),
        ("zero-rows:rank=2;communication-skipped:rank=0", [0, 2]),
        ("overwritten-by-peer:rank=1;flipped-token-bit:rank=1", [1]),
        ("nan-lanes:rank=0;times-ep-size:rank=3", [0, 3]),
    ],
)
def test_damage_before_combine_does_not_hide_a_combine_fault(inject: str, guilty: list[int]) -> None:
    outcome = outcome_of(tiny_case(RANKS, tokens=20, inject=inject))
    stages = [found.stage for found in outcome.diagnosis if found.stage]
    assert sorted({rank for _, _, blamed in blame_of(outcome) for rank in blamed}) == guilty
    assert stages[-1] == "combine"
    assert stages == sorted(stages, key=LAYER_STAGES.index)


def pair_case(number: int, ranks: int) -> Case:
    """Random case with two random faults, on random ranks, in random arms."""
    chance = random.Random(number)
    texts, keys = [], random_keys(chance, ranks)
    for name in chance.choices(PAIRED, k=2):
        arm = "" if FAULTS[name].arm else chance.choice(("", "padded", "control", "repadded", "truncated"))
        texts.append(f"{name}:rank={chance.randrange(ranks)}" + (f",arm={arm}" if arm else ""))
        keys |= FAULTS[name].shape
    return resolve_case([Layer("pair", keys | {"inject": ";".join(texts)})], ranks).case


def wrongly_blamed(outcome: Outcome) -> list[Diagnosis]:
    """Diagnoses that blame a rank on which no fault has changed anything."""
    assert outcome.gathered is not None
    guilty = {record.rank for record in outcome.gathered.observations if any(record.injected.values())}
    return [found for found in outcome.diagnosis if found.stage and not guilty.issuperset(found.ranks)]


@settings(max_examples=400 if SOAK else 40, deadline=None, derandomize=True)
@given(st.integers(0, 1 << 40))
def test_two_random_faults_give_no_certain_blame_of_a_healthy_rank(number: int) -> None:
    outcome = outcome_of(pair_case(number, RANKS))
    assert [found for found in wrongly_blamed(outcome) if found.confidence == "certain"] == []


@pytest.mark.parametrize("arm", ["padded", "control", "repadded", "truncated"])
@pytest.mark.parametrize("fault", ["flipped-token-bit", "share-doubled", "swapped-tokens"])
@pytest.mark.parametrize("inputs", [SPLIT_K, ATOMIC], ids=["drift", "atomic sums"])
def test_combine_fault_is_found_in_gaussian_inputs(inputs: dict[str, object], fault: str, arm: str) -> None:
    case = tiny_case(RANKS, inject=f"{fault}:rank=2,arm={arm}", require="tolerance", **inputs)
    outcome = outcome_of(case)
    assert outcome.judgement.verdict is (Verdict.BASELINE_WRONG if arm == "padded" else Verdict.CORRUPT)
    assert "the sum of what ranks returned" in outcome.judgement.reasons[0].message
    ((cause, _, blamed),) = blame_of(outcome)
    assert cause.startswith("combine: ")
    assert blamed == [2]


def test_combine_faults_on_two_ranks_are_not_blamed_on_an_atomic_kernel() -> None:
    inject = "share-doubled:rank=1,arm=control;swapped-tokens:rank=2,arm=control"
    outcome = outcome_of(tiny_case(RANKS, inject=inject, **ATOMIC))
    assert outcome.judgement.verdict is Verdict.CORRUPT
    assert [blamed for _, _, blamed in blame_of(outcome)] == [[1], [2]]


@pytest.mark.parametrize("seed", range(3))
def test_nondeterminism_of_an_atomic_kernel_gets_no_other_verdict(seed: int) -> None:
    verdict = outcome_of(tiny_case(RANKS, seed=seed, limit="sum32", **ATOMIC)).judgement.verdict
    assert verdict in (Verdict.NONDETERMINISTIC, Verdict.PASS)


@pytest.mark.parametrize("kernel", ["IntraNode", "IntraNodeLL", "InterNodeV1", "InterNodeV1LL", "AsyncLL"])
def test_combine_of_every_mori_kernel_is_predicted_bit_for_bit(kernel: str) -> None:
    nodes = {"gpu_per_node": 2} if kernel.startswith("Inter") else {}
    mori = {"transport": "mori", "emulate": True, "mori_kernel": kernel, "limit": "off"} | nodes | SPLIT_K
    assert outcome_of(tiny_case(RANKS, **mori)).judgement.verdict is Verdict.PASS
    lost = outcome_of(tiny_case(RANKS, inject="share-lost:rank=1,arm=control", **mori))
    assert blame_of(lost) == [("combine: a rank's share is missing", "certain", [1])]


@pytest.mark.parametrize("numerics", ["exact", "gaussian"])
@pytest.mark.parametrize("quant", ["fp8_direct_cast", "fp8_blockwise"])
def test_quantised_combine_is_compared_with_a_second_run_on_the_same_rows(quant: str, numerics: str) -> None:
    case = {"transport": "mori", "emulate": True, "combine_quant": quant} | SPLIT_K
    case |= {"numerics": numerics, "require": "tolerance", "limit": "off"}  # padded and control return the same rows
    assert outcome_of(tiny_case(RANKS, **case)).judgement.verdict is Verdict.PASS
    flipped = outcome_of(tiny_case(RANKS, inject="flipped-token-bit:rank=1,arm=control,bit=5", **case))
    assert flipped.judgement.verdict is Verdict.CORRUPT
    assert flipped.diagnosis[0].ranks == [1]
    damaged = outcome_of(tiny_case(RANKS, inject="flipped-bit:rank=1,arm=control", **case))
    assert [(found.stage, found.ranks) for found in damaged.diagnosis] == [("dispatch", [1])]


@pytest.mark.parametrize("cu_count", [304, 256])
def test_saturating_cast_in_combine_is_identified_by_the_devices_fp8_format(cu_count: int) -> None:
    """An exact sum reaches 256 units of 16, above the largest value of either format."""
    mori = {"transport": "mori", "emulate": True, "cu_count": cu_count}
    outcome = outcome_of(tiny_case(RANKS, inject="saturating-cast:rank=1", **mori))
    assert blame_of(outcome) == [("combine: a rank's share was cast to fp8 without a scale", "certain", [1])]


def test_wrong_rows_of_the_padded_arm_blame_no_other_arm() -> None:
    outcome = outcome_of(tiny_case(RANKS, inject="swapped-rows:rank=2,arm=padded", **SPLIT_K))
    assert outcome.judgement.verdict is Verdict.BASELINE_WRONG
    assert [(found.stage, found.ranks) for found in outcome.diagnosis] == [("dispatch", [2])]


@pytest.mark.parametrize("arm", ["padded", "control", "truncated"])
def test_ignored_receive_capacity_is_a_fault_of_dispatch(arm: str) -> None:
    shape = {"prealloc_max_recv_tokens": 96, "tokens": 12}
    outcome = outcome_of(tiny_case(RANKS, inject=f"capacity-ignored:rank=2,arm={arm}", **shape))
    assert outcome.judgement.verdict is (Verdict.BASELINE_WRONG if arm == "padded" else Verdict.CORRUPT)
    assert blame_of(outcome) == [("dispatch: another capacity", "certain", [2])]
    message = f"rank 2, {arm}, dispatch: capacity differs by 160 rows from the agreed 96"
    assert [reason.message for reason in outcome.judgement.reasons] == [message]


@pytest.mark.parametrize("arm", ["padded", "truncated"])
def test_first_reason_names_the_first_wrong_stage_and_not_its_consequences(arm: str) -> None:
    outcome = outcome_of(tiny_case(RANKS, tokens=20, inject=f"total-recv-short:rank=3,arm={arm}"))
    reason = outcome.judgement.reasons[0]
    assert (reason.code, reason.rank) == ("dispatch-differs", 3)
    both = outcome_of(tiny_case(RANKS, inject=f"flipped-token-bit:rank=0,arm={arm};zero-rows:rank=3,arm={arm}"))
    assert [(reason.code, reason.rank) for reason in both.judgement.reasons][:2] == [
        ("experts-differs", 3),
        ("combine-differs", 0),
    ]
