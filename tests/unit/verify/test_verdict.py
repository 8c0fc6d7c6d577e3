"""The verdict by table: the ranks' observations, the verdict, and the codes of its reasons."""

from __future__ import annotations

from typing import Any

import pytest

from distbench.case.stages import Arm
from distbench.errors import Verdict
from distbench.verify.records import (
    NO_DIFFERENCE,
    NOT_PROVEN,
    ORACLE,
    FloatError,
    Judgement,
    Replay,
    ResolvedCase,
    Survivors,
    Timed,
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

SHORT = RECEIVED - 1
GAUSSIAN: dict[str, Any] = {"numerics": "gaussian"}
TOLERANT: dict[str, Any] = {"numerics": "gaussian", "require": "tolerance"}
ORDERED: dict[str, Any] = {"kernels": kernels("reduce")}
OTHER: dict[str, Any] = {"kernels": kernels("reduce", truncated=32)}
NEAR, FAR = 2.0**-6, 2.0**-4


def codes(found: Judgement) -> tuple[str, list[str]]:
    """Verdict and the codes of its reasons, except the note that the limit is not proven for other routings."""
    return found.verdict.value, [reason.code for reason in found.reasons if reason.code != NOT_PROVEN]


def verdict_of(resolved: ResolvedCase, *ranks: dict[str, Any], **options: Any) -> tuple[str, list[str]]:
    return codes(judge(resolved, gathered(resolved, *ranks, **options)))


def timed(tokens: int, drift: float | None) -> Timed:
    last = NO_DIFFERENCE if not tokens else SOME
    return Timed(slowest_us={}, layer_us=[], last=last, drift=drift, flushed_bytes=0, peak_device_bytes=None)


def distance(**arms: float | None) -> dict[str, float | None]:
    return dict.fromkeys(ARMS, 0.0) | arms


def nan_in(*arms: str) -> dict[str, int]:
    return dict.fromkeys(ARMS, 0) | dict.fromkeys(arms, 2)


@pytest.mark.parametrize(
    "resolved", [asked(), asked(**GAUSSIAN), asked(limit=None), asked(policy="guard", limit=SHORT)]
)
def test_case_without_findings_passes(resolved: ResolvedCase) -> None:
    verdict, reasons = verdict_of(resolved)
    assert (verdict, reasons) == ("PASS", ["guarded"] if resolved.short_ranks else [])


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize(("stage", "against"), [("dispatch", "source"), ("experts", ORACLE), ("combine", "the sum")])
@pytest.mark.parametrize("inputs", [{}, GAUSSIAN, TOLERANT])
@pytest.mark.parametrize("limit", [RECEIVED, SHORT])
def test_proven_divergence_decides_the_verdict_under_any_other_finding(
    arm: str, stage: str, against: str, inputs: dict[str, Any], limit: int
) -> None:
    noisy = {"differing": {"padded/control": SOME}} if inputs else {}
    resolved = asked(limit, **inputs)
    verdict, reasons = verdict_of(resolved, {}, {"divergences": [divergence(arm, stage, against)]}, **noisy)
    assert verdict == ("BASELINE_WRONG" if arm == "padded" else "CORRUPT")
    assert reasons[0] == f"{stage}-differs"


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("inputs", [{}, GAUSSIAN, TOLERANT])
@pytest.mark.parametrize("mode", ["atomic", "reduce"])
def test_nan_in_a_token_without_lost_rows_is_always_a_failure(arm: str, inputs: dict[str, Any], mode: str) -> None:
    resolved = asked(**inputs)
    there = {"kernels": kernels(mode), "nan_tokens": nan_in(arm), "distance": distance(**{arm: None})}
    verdict, reasons = verdict_of(resolved, {}, there, differing={"padded/control": SOME} if inputs else {})
    assert verdict == ("BASELINE_WRONG" if arm == "padded" else "CORRUPT")
    assert "nan" in reasons


@pytest.mark.parametrize("numerics", ["exact", "gaussian"])
def test_nan_in_a_token_with_a_lost_row_counts_as_under_limit(numerics: str) -> None:
    resolved = asked(SHORT, numerics=numerics)
    pairs = dict.fromkeys(("padded/repadded", "repadded/truncated", "padded/truncated"), 0)
    there = {
        "nan_tokens": nan_in("repadded", "truncated"),
        "survivors": Survivors(nan_in(), pairs),
        "divergences": [lost_as_asked("repadded", resolved), lost_as_asked("truncated", resolved)],
    }
    differing = dict.fromkeys(pairs, SOME)
    assert verdict_of(resolved, there, there, differing=differing) == (
        "UNDER_LIMIT",
        ["limit-below-total-recv", "limit-below-total-recv", "damage"],
    )


@pytest.mark.parametrize(
    ("survivors", "code"),
    [
        (Survivors(nan_in("truncated"), {}), "nan"),
        (Survivors(nan_in(), {"padded/truncated": 1}), "bits-differ"),
        (Survivors(nan_in(), {"padded/repadded": 1}), "bits-differ"),
    ],
)
def test_damage_to_tokens_without_lost_rows_precedes_under_limit(survivors: Survivors, code: str) -> None:
    resolved = asked(SHORT)
    verdict, reasons = verdict_of(resolved, {"survivors": survivors})
    assert (verdict, reasons[0]) == ("CORRUPT", code)
    found = judge(resolved, gathered(resolved, {"survivors": survivors})).findings
    assert [one.verdict for one in found] == [Verdict.CORRUPT, Verdict.UNDER_LIMIT]


@pytest.mark.parametrize(("more", "verdict"), [(0, "UNDER_LIMIT"), (1, "CORRUPT"), (-1, "CORRUPT")])
def test_lost_rows_other_than_those_past_the_limit_are_corrupt(more: int, verdict: str) -> None:
    resolved = asked(SHORT - 1)
    found = {"divergences": [lost_as_asked("truncated", resolved, more=more)]}
    assert verdict_of(resolved, {}, found)[0] == verdict


@pytest.mark.parametrize("rank", [0, 1])
def test_rows_lost_under_a_sufficient_limit_are_corrupt(rank: int) -> None:
    resolved = asked(RECEIVED)
    lost = {"divergences": [divergence("truncated", "truncate", "received", rank=rank)]}
    assert verdict_of(resolved, *(lost if rank == one else {} for one in (0, 1))) == ("CORRUPT", ["truncate-differs"])


@pytest.mark.parametrize(
    ("inputs", "found", "expected"),
    [
        ({}, SOME, ("CORRUPT", ["bits-differ"])),
        (GAUSSIAN, SOME, ("NONDETERMINISTIC", ["control-differs"])),
        (TOLERANT, SOME, ("PASS", ["control-differs"])),
    ],
)
def test_differing_control_arm_of_an_atomic_kernel_gives_its_verdict(
    inputs: dict[str, Any], found: Any, expected: Any
) -> None:
    assert verdict_of(asked(**inputs), differing={"padded/control": found}) == expected


@pytest.mark.parametrize("require", ["bitwise", "tolerance"])
def test_ordered_kernel_with_differing_control_arm_is_nondeterministic(require: str) -> None:
    resolved = asked(numerics="gaussian", require=require)
    both = (ORDERED, ORDERED)
    assert verdict_of(resolved, *both, differing={"padded/control": SOME}) == ("NONDETERMINISTIC", ["control-differs"])
    assert verdict_of(resolved, *both, differing={"padded/repadded": SOME}) == ("CORRUPT", ["bits-differ"])
    rows = {"divergences": [divergence("truncated", against=Arm.PADDED)]} | ORDERED
    assert verdict_of(resolved, ORDERED, rows) == ("CORRUPT", ["experts-differs"])


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [(GAUSSIAN, ("DRIFT", ["kernel-drift"])), (TOLERANT, ("PASS", ["kernel-drift"]))],
)
def test_differing_bits_of_another_kernel_within_tolerance_are_drift(inputs: dict[str, Any], expected: Any) -> None:
    resolved = asked(**inputs)
    rows = {"divergences": [divergence("truncated", against=Arm.PADDED)], "distance": distance(truncated=NEAR)} | OTHER
    assert verdict_of(resolved, OTHER, rows) == expected
    both = {"padded/truncated": SOME, "repadded/truncated": SOME}
    assert verdict_of(resolved, OTHER, OTHER, differing=both) == expected


@pytest.mark.parametrize(
    ("errors", "bounds"), [([arm_error("truncated", within=True)], "within its ideal"), ([], "within tolerance")]
)
def test_message_of_a_drift_names_the_bounds_that_judged_it(errors: list[Any], bounds: str) -> None:
    resolved = asked(**GAUSSIAN)
    there = OTHER | {"errors": errors}
    found = judge(resolved, gathered(resolved, there, there, differing={"padded/truncated": SOME}))
    assert found.reasons[0].code == "kernel-drift"
    assert found.reasons[0].message.endswith(bounds)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("error", [FAR, None])
@pytest.mark.parametrize("arm", ARMS[1:])
@pytest.mark.parametrize("kernel", [OTHER, {"kernels": kernels()}], ids=["another kernel", "atomic"])
def test_rank_outside_tolerance_is_corrupt_though_another_is_within(
    rank: int, error: float | None, arm: str, kernel: Any
) -> None:
    near, far = (kernel | {"distance": distance(**{arm: one})} for one in (NEAR, error))
    ranks = [far if rank == one else near for one in (0, 1)]
    verdict, reasons = verdict_of(asked(**TOLERANT), *ranks, differing={f"padded/{arm}": SOME})
    assert verdict == "CORRUPT"
    assert "far" in reasons


@pytest.mark.parametrize("arm", ["control", "repadded"])
def test_arm_outside_tolerance_is_corrupt_though_another_is_within(arm: str) -> None:
    far = OTHER | {"distance": distance(truncated=FAR, **{arm: 0.0})}
    assert verdict_of(asked(**TOLERANT), far, OTHER, differing={"padded/truncated": SOME})[0] == "CORRUPT"
    near = OTHER | {"distance": distance(truncated=0.0, **{arm: FAR})}
    assert verdict_of(asked(**TOLERANT), near, OTHER)[0] == "CORRUPT"


@pytest.mark.parametrize(
    ("quant", "error", "verdict"),
    [
        ("none", 2.0**-5, "PASS"),
        ("none", 2.0**-5 + 2.0**-20, "CORRUPT"),
        ("none", 2.0**-4, "CORRUPT"),
        ("fp8_direct_cast", 2.0**-3, "PASS"),
        ("fp8_blockwise", 2.0**-3 + 2.0**-20, "CORRUPT"),
        ("fp4_blockwise", 2.0**-1, "PASS"),
        ("fp4_blockwise", 2.0**-1 + 2.0**-20, "CORRUPT"),
    ],
)
def test_tolerance_follows_the_combine_format(quant: str, error: float, verdict: str) -> None:
    resolved = asked(**TOLERANT, combine_quant=quant, transport="mori", emulate=True)
    there = OTHER | {"distance": distance(truncated=error)}
    assert verdict_of(resolved, there, OTHER, differing={"padded/truncated": SOME})[0] == verdict


def test_rows_outside_rounding_are_corrupt_though_tokens_are_within_tolerance() -> None:
    far = {"divergences": [divergence("truncated", against=Arm.PADDED, far=1)]}
    assert verdict_of(asked(**TOLERANT), {}, far) == ("CORRUPT", ["experts-differs"])


@pytest.mark.parametrize("arm", ARMS)
@pytest.mark.parametrize("stage", ["experts", "combine"])
def test_error_outside_its_bounds_fails_under_any_requirement(arm: str, stage: str) -> None:
    resolved = asked(**TOLERANT)
    there = {"errors": [arm_error("padded", within=True), arm_error(arm, within=False, stage=stage, ratio=3.0)]}
    verdict, reasons = verdict_of(resolved, {}, there, differing={"padded/control": SOME})
    expected = ["error", "bits-differ"] if arm == "control" else ["error"]
    assert (verdict, reasons) == ("BASELINE_WRONG" if arm == "padded" else "CORRUPT", expected)


@pytest.mark.parametrize(
    ("worst", "errors", "verdict"),
    [
        (2.0**-5, [], "PASS"),
        (2.0**-4, [], "BASELINE_WRONG"),
        (None, [], "BASELINE_WRONG"),
        (2.0**-4, [arm_error("padded", within=True)], "PASS"),
    ],
)
def test_float_reference_decides_if_no_error_was_measured(worst: float | None, errors: list[Any], verdict: str) -> None:
    there = {"reference": FloatError(worst, 4), "errors": errors}
    assert verdict_of(asked(**TOLERANT), {}, there)[0] == verdict


@pytest.mark.parametrize("disputed", [[0], [1], [0, 1]])
def test_every_disputing_rank_is_listed_in_the_reasons(disputed: list[int]) -> None:
    resolved = asked()
    found = judge(resolved, changed(gathered(resolved), disputed=disputed))
    assert codes(found) == ("CORRUPT", ["disputed"] * len(disputed))
    assert [reason.rank for reason in found.reasons] == disputed


@pytest.mark.parametrize("numerics", ["exact", "gaussian"])
@pytest.mark.parametrize("pair", ["padded/oracle", "padded/control", "padded/repadded", "repadded/truncated"])
def test_difference_in_any_pair_of_arms_does_not_pass(numerics: str, pair: str) -> None:
    resolved = asked(numerics=numerics)
    if pair in gathered(resolved).comparisons:
        assert verdict_of(resolved, ORDERED, ORDERED, differing={pair: SOME})[0] != "PASS"


@pytest.mark.parametrize(
    ("inputs", "kernel", "arm", "drift", "expected"),
    [
        ({}, "atomic", "padded", 0.0, "CORRUPT"),
        (GAUSSIAN, "atomic", "padded", NEAR, "NONDETERMINISTIC"),
        (TOLERANT, "atomic", "padded", NEAR, "PASS"),
        (TOLERANT, "atomic", "padded", FAR, "CORRUPT"),
        (TOLERANT, "atomic", "padded", None, "CORRUPT"),
        (TOLERANT, "reduce", "padded", NEAR, "CORRUPT"),
        (GAUSSIAN, "atomic", "truncated", NEAR, "DRIFT"),
    ],
)
def test_timed_iteration_with_other_bits_gives_its_verdict(
    inputs: dict[str, Any], kernel: str, arm: str, drift: float | None, expected: str
) -> None:
    there = {"kernels": kernels(kernel, truncated=32), "timed": {arm: timed(3, drift)}}
    resolved = asked(**inputs)
    assert verdict_of(resolved, {"kernels": there["kernels"]}, there)[0] == expected
    assert verdict_of(resolved, there | {"timed": {arm: timed(0, 0.0)}})[0] == "PASS"


@pytest.mark.parametrize(("near", "verdict"), [(0, "PASS"), (2, "NONDETERMINISTIC")])
def test_graph_replays_within_tolerance_give_the_verdict_of_differing_bits(near: int, verdict: str) -> None:
    assert verdict_of(asked(**GAUSSIAN), {"replays": [Replay(4, 0, near)]})[0] == verdict


def test_all_matching_rules_are_kept_in_order_of_precedence() -> None:
    resolved = asked(SHORT, **GAUSSIAN)
    there = {
        "divergences": [
            divergence("padded", "dispatch", "source"),
            divergence("truncated", "combine", "the sum"),
            lost_as_asked("truncated", resolved),
        ]
    }
    found = judge(resolved, gathered(resolved, {}, there, differing={"padded/control": SOME}))
    assert [one.verdict.value for one in found.findings] == [
        "BASELINE_WRONG",
        "CORRUPT",
        "UNDER_LIMIT",
        "NONDETERMINISTIC",
    ]
    assert found.reasons == found.findings[0].reasons
    assert found.first_divergence == there["divergences"][0]


def test_rounding_difference_is_not_the_first_divergence() -> None:
    resolved = asked(**GAUSSIAN)
    noise = divergence("control", against=Arm.PADDED)
    wrong = divergence("truncated", against=Arm.PADDED, far=4)
    found = judge(resolved, gathered(resolved, {}, {"divergences": [noise, wrong]}))
    assert (found.verdict.value, found.first_divergence) == ("CORRUPT", wrong)


def test_difference_from_a_wrong_padded_arm_blames_no_other_arm() -> None:
    resolved = asked(**TOLERANT)
    there = {"nan_tokens": nan_in("padded"), "distance": dict.fromkeys(ARMS)}
    pairs = {"padded/control": SOME, "repadded/truncated": SOME}
    found = judge(resolved, gathered(resolved, there, there, differing=pairs))
    assert [one.verdict.value for one in found.findings] == ["BASELINE_WRONG"]
