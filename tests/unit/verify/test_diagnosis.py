"""Diagnoses by table: the ranks' observations, and the stage, ranks and confidence of the diagnosis."""

from __future__ import annotations

from typing import Any

import pytest

from distbench.case.stages import Arm
from distbench.verify.diagnosis import diagnose
from distbench.verify.records import (
    ORACLE,
    RETURNED,
    SEVERAL,
    ArmError,
    Diagnosis,
    Evidence,
    Gathered,
    LostRows,
    ResolvedCase,
    WrongRow,
)
from distbench.verify.verdict import judge
from tests.observations import (
    ARMS,
    RECEIVED,
    SOME,
    arm_error,
    asked,
    changed,
    divergence,
    gathered,
    kernels,
    lost_as_asked,
)

GAUSSIAN: dict[str, Any] = {"numerics": "gaussian", "require": "tolerance"}


def causes(resolved: ResolvedCase, found: Gathered) -> list[Diagnosis]:
    return diagnose(resolved, found, judge(resolved, found))


def told(resolved: ResolvedCase, *ranks: dict[str, Any], **options: Any) -> list[tuple[str, list[int], str]]:
    found = causes(resolved, gathered(resolved, *ranks, **options))
    return [(one.stage, one.ranks, one.confidence) for one in found]


def shares(suspects: list[int], examined: int) -> dict[str, Any]:
    evidence = Evidence(
        pattern="a rank's share is missing", suspects=suspects, examined=examined, by_destination={"0": 1}
    )
    return {"divergences": [divergence("padded", "combine", RETURNED, evidence=evidence)]}


def received(*rows: WrongRow, by_source: dict[int, int]) -> dict[str, Any]:
    evidence = Evidence(pattern="other values", received=list(rows), by_source=by_source)
    return {"evidence": evidence}


@pytest.mark.parametrize("inputs", [{}, GAUSSIAN])
def test_no_diagnosis_is_made_if_nothing_differs(inputs: dict[str, Any]) -> None:
    assert told(asked(**inputs)) == []


@pytest.mark.parametrize("arm", ["padded", "truncated"])
@pytest.mark.parametrize("rank", [0, 1])
def test_wrong_expert_rows_are_attributed_to_their_rank(arm: str, rank: int) -> None:
    wrong = {"divergences": [divergence(arm, rank=rank)]}
    assert told(asked(), *(wrong if one == rank else {} for one in (0, 1))) == [("experts", [rank], "certain")]


def test_wrong_kernel_is_named_beside_a_correct_one() -> None:
    resolved = asked()
    there = {"divergences": [divergence("truncated")], "kernels": kernels(truncated=32)}
    (found,) = causes(resolved, gathered(resolved, {}, there))
    assert "kernel H bm32 atomic, selected by M = 32; right with M = 128" in found.evidence


@pytest.mark.parametrize(
    ("suspects", "examined", "ranks", "confidence"),
    [([0], 2, [0], "certain"), ([0], 1, [0], "likely"), ([0, 1], 4, [], "likely")],
)
def test_wrong_partial_sum_is_attributed_to_the_one_rank_that_explains_it(
    suspects: list[int], examined: int, ranks: list[int], confidence: str
) -> None:
    assert told(asked(), {}, shares(suspects, examined)) == [("combine", ranks, confidence)]


def test_row_wrong_alike_on_two_ranks_is_attributed_to_its_sender() -> None:
    row = WrongRow((0, 3), 77, [0, 1])
    ranks = [
        {
            "divergences": [
                divergence("padded", "dispatch", "source", rank=rank, rows=1, **received(row, by_source={0: 1}))
            ]
        }
        for rank in (0, 1)
    ]
    (found,) = causes(asked(), gathered(asked(), *ranks))
    assert (found.stage, found.ranks) == ("dispatch", [0])
    assert found.cause.endswith("as sent")


def test_row_correct_on_another_rank_is_attributed_to_its_receiver() -> None:
    row = WrongRow((0, 3), 77, [0, 1])
    wrong = {"divergences": [divergence("padded", "dispatch", "source", rows=1, **received(row, by_source={0: 1}))]}
    assert told(asked(), {}, wrong) == [("dispatch", [1], "certain")]


def test_two_faults_are_diagnosed_as_several() -> None:
    resolved = asked()
    here = {"divergences": [divergence("truncated", rank=0)]}
    there = {"divergences": [divergence("padded", "truncate", "source")]}
    found = causes(resolved, gathered(resolved, here, there))
    assert found[0].cause == SEVERAL
    assert [(one.stage, one.ranks) for one in found[1:]] == [("truncate", [1]), ("experts", [0])]


@pytest.mark.parametrize(("differing", "confidence"), [([(0, 4), (1, 3)], "certain"), ([(1, 3)], "likely")])
def test_lost_rows_are_a_certain_cause_if_exactly_their_tokens_differ(
    differing: list[tuple[int, int]], confidence: str
) -> None:
    resolved = asked(RECEIVED - 1)
    ranks = [
        {"lost": LostRows(1, [(1 - rank, 3 + rank)]), "divergences": [lost_as_asked("truncated", resolved, rank)]}
        for rank in (0, 1)
    ]
    found = gathered(resolved, *ranks, differing={"padded/truncated": SOME})
    found = changed(found, differing=found.differing | {"padded/truncated": differing})
    first = causes(resolved, found)[0]
    assert (first.cause, first.ranks, first.confidence) == ("lost by the cut", [0, 1], confidence)


def test_nan_is_diagnosed_as_poison_that_was_read() -> None:
    resolved = asked(**GAUSSIAN)
    there = {"nan_tokens": dict.fromkeys(ARMS, 0) | {"truncated": 3}}
    found = causes(resolved, gathered(resolved, {}, there))
    assert [one.cause for one in found] == ["poison read from undefined rows"]
    assert "3 tokens of truncated" in found[0].evidence


def test_rounding_difference_is_no_cause_beside_an_unexplained_one() -> None:
    resolved = asked(**GAUSSIAN)
    noise = divergence("control", against=Arm.PADDED, rank=0)
    for wrong in (divergence("truncated", against=Arm.PADDED, far=4), divergence("truncated", "dispatch", "source")):
        found = causes(resolved, gathered(resolved, {"divergences": [noise]}, {"divergences": [wrong]}))
        assert [(one.stage, one.ranks) for one in found] == [(wrong.stage, [1])]


def test_rounding_difference_in_one_arm_hides_no_damage_in_another_on_the_same_rank() -> None:
    both = [divergence("control", against=Arm.PADDED), divergence("truncated", against=Arm.PADDED, far=4)]
    noise = {"divergences": [divergence("control", against=Arm.PADDED, rank=0)]}
    (found,) = causes(asked(**GAUSSIAN), gathered(asked(**GAUSSIAN), noise, {"divergences": both}))
    assert (found.stage, found.ranks) == ("experts", [1])
    assert "truncated" in found.evidence


def test_errors_outside_their_bounds_in_all_arms_alike_blame_the_rank_of_the_rows() -> None:
    rows, tokens = (arm_error("padded", within=False, stage=stage, ratio=9.0) for stage in ("experts", "combine"))
    assert told(asked(**GAUSSIAN), {"errors": [tokens]}, {"errors": [rows, tokens]}) == [("experts", [1], "likely")]
    (found,) = causes(asked(**GAUSSIAN), gathered(asked(**GAUSSIAN), {"errors": [tokens]}, {"errors": [tokens]}))
    assert (found.stage, found.ranks) == ("combine", [])
    assert "which rank is not known" in found.evidence


def rows_within(*outside: str) -> list[ArmError]:
    """Errors of the expert rows of all arms on one rank."""
    return [arm_error(arm, within=arm not in outside, stage="experts") for arm in ARMS]


def test_right_rows_that_differ_from_wrong_padded_ones_are_no_rounding_difference() -> None:
    """Beside another rank's rounding, and without it where the wrong rows are the same in all arms."""
    noise = {"divergences": [divergence("control", against=Arm.PADDED, rank=0)], "errors": rows_within()}
    wrong = {"divergences": [divergence("control", against=Arm.PADDED)], "errors": rows_within("padded")}
    assert told(asked(**GAUSSIAN), noise, wrong) == [("experts", [1], "likely")]
    everywhere = {"errors": rows_within(*ARMS)}
    assert told(asked(**GAUSSIAN), noise, everywhere) == [("experts", [1], "likely")]


def test_experts_are_blamed_beside_damaged_arrivals_by_the_errors_of_their_other_rows() -> None:
    arrived = divergence("padded", "dispatch", "source", rank=0)
    rounded = divergence("control", against=Arm.PADDED, rank=0)
    outside = {"divergences": [arrived], "errors": rows_within(*ARMS)}
    found = told(asked(**GAUSSIAN), outside)
    assert found[1:] == [("dispatch", [0], "certain"), ("experts", [0], "likely")]
    within = {"divergences": [arrived, rounded], "errors": rows_within()}
    assert told(asked(**GAUSSIAN), within) == [("dispatch", [0], "certain")]


def test_rows_that_are_far_blame_experts_whose_arrivals_are_all_damaged() -> None:
    arrived = divergence("padded", "dispatch", "source", rank=0)
    others = [arm_error(arm, within=True, stage="experts") for arm in ARMS if arm not in ("padded", "control")]
    for far, stages in ((0, ["dispatch"]), (4, ["", "dispatch", "experts"])):
        rounded = divergence("control", against=Arm.PADDED, rank=0, far=far)
        damaged = {"divergences": [arrived, rounded], "errors": others}
        assert [stage for stage, *_ in told(asked(**GAUSSIAN), damaged)] == stages


def test_rounding_difference_is_diagnosed_if_nothing_else_is_wrong() -> None:
    noise = {"divergences": [divergence("control", against=Arm.PADDED)]}
    assert told(asked(numerics="gaussian"), {}, noise) == [("experts", [1], "likely")]


def test_diagnosis_uses_the_kind_of_inputs_that_failed() -> None:
    resolved = asked(numerics="both")
    exact, gaussian = (asked(numerics=one) for one in ("exact", "gaussian"))
    wrong = {"divergences": [divergence("truncated", against=Arm.PADDED, far=4)]}
    found = changed(gathered(exact), gaussian=gathered(gaussian, {}, wrong))
    assert [(one.stage, one.ranks) for one in causes(resolved, found)] == [("experts", [1])]
    proven = {"divergences": [divergence("truncated", against=ORACLE, rank=0)]}
    found = changed(gathered(exact, proven), gaussian=gathered(gaussian, {}, wrong))
    assert [(one.stage, one.ranks) for one in causes(resolved, found)] == [("experts", [0])]


def absent(rank: int, by_source: dict[int, int]) -> dict[str, Any]:
    evidence = Evidence(by_source=by_source)
    return {"divergences": [divergence("padded", "dispatch", "the agreed", rank=rank, rows=2, evidence=evidence)]}


def test_rows_of_one_rank_that_reached_no_other_are_attributed_to_their_sender() -> None:
    resolved = asked()
    assert told(resolved, absent(0, {1: 2}), {}, absent(2, {1: 3}), {}) == [("dispatch", [1], "likely")]


@pytest.mark.parametrize("lost", [({0: 1, 1: 1}, {1: 2}), ({2: 1}, {2: 2})])
def test_absent_rows_of_several_ranks_or_of_the_rank_itself_are_attributed_to_receivers(
    lost: tuple[dict[int, int], dict[int, int]],
) -> None:
    found = told(asked(), absent(0, lost[0]), {}, absent(2, lost[1]), {})
    assert {(stage, tuple(ranks)) for stage, ranks, _ in found} == {("dispatch", (0, 2))}


def test_row_that_only_its_sender_has_right_is_attributed_to_it_where_two_others_have_it_wrong_alike() -> None:
    row = WrongRow((1, 3), 77, [0, 1, 2])
    wrong = [
        {
            "divergences": [
                divergence("padded", "dispatch", "source", rank=rank, rows=1, **received(row, by_source={1: 1}))
            ]
        }
        for rank in (0, 2)
    ]
    (found,) = causes(asked(), gathered(asked(), wrong[0], {}, wrong[1], {}))
    assert (found.stage, found.ranks) == ("dispatch", [1])
