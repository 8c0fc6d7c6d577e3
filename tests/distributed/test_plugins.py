"""Plugins on real ranks: right ones pass, wrong values are attributed to the stage and rank, refusals come from all."""

from __future__ import annotations

from typing import Any

import pytest

from distbench.case.plugins import KINDS
from distbench.case.resolve import FLAGS, Layer, resolve_case
from distbench.case.spec import Case
from distbench.case.stages import Arm, Stage
from distbench.distributed.session import Session
from distbench.errors import BrokenContract, Verdict
from distbench.pipeline.run_case import run_case
from distbench.report.bundle.recorded import recorded_order
from distbench.transport.sum_order import SumOrder
from distbench.verify.records import Outcome
from tests.ranks import on_ranks

RANKS = 2
TINY = {"model": "tiny", "max_dispatch_tokens_per_rank": 64, "device": "cpu", "tokens": (3, 5)}


def brought(**values: Any) -> Case:
    parts = {
        key: f"tests.brought_plugins:{value}" if key in KINDS and value != "aiter" else value
        for key, value in values.items()
    }
    return resolve_case([Layer(FLAGS, TINY | parts)], RANKS).case


def outcome_of(session: Session, case: Case) -> Outcome | None:
    return run_case(session, case)


def outcome(case: Case) -> Outcome:
    found = on_ranks(RANKS, outcome_of, case)[0]
    assert isinstance(found, Outcome)
    return found


def test_right_transport_and_experts_pass_and_are_named_in_the_packages() -> None:
    found = outcome(brought(transport="OPTIONED", experts="SAME", kernel_table=""))
    assert found.gathered is not None
    assert found.judgement.verdict is Verdict.PASS, found.judgement.reasons
    observed = found.gathered.observations[1]
    assert observed.packages["transport tests.brought_plugins:OPTIONED"] == {"name": "optioned", "version": "1.2"}
    assert observed.packages["experts tests.brought_plugins:SAME"] == {"name": "same", "version": "3"}
    assert recorded_order(observed.transport) == SumOrder()
    assert observed.kernels["padded"]["label"] == "same"


@pytest.mark.parametrize(
    ("parts", "stage", "ranks"),
    [
        ({"transport": "OPTIONED", "transport_option": "factor=2"}, Stage.COMBINE, {1}),
        ({"transport": "LosesRow"}, Stage.DISPATCH, {0}),
        ({"experts": "Unweighted"}, Stage.EXPERTS, {0, 1}),
        ({"experts": "Swapped"}, Stage.EXPERTS, {0, 1}),
        ({"experts": "InPlace"}, Stage.EXPERTS, {0}),
        ({"experts": "WritesCount"}, Stage.EXPERTS, {0}),
        ({"experts": "WritesMask"}, Stage.EXPERTS, {0}),
        ({"transport": "Late"}, Stage.DISPATCH, {0}),
        ({"transport": "OneBufferPadded"}, Stage.COMBINE, {0}),
    ],
)
def test_wrong_values_of_a_plugin_are_attributed_to_its_stage_and_rank(
    parts: dict[str, str], stage: Stage, ranks: set[int]
) -> None:
    found = outcome(brought(numerics="exact", **parts))
    assert found.judgement.verdict is Verdict.BASELINE_WRONG
    assert found.judgement.first_divergence is not None
    assert found.judgement.first_divergence.stage == stage
    assert found.judgement.first_divergence.rank in ranks


def test_experts_that_round_their_weights_in_place_are_no_pass() -> None:
    found = outcome(brought(experts="WritesWeights", numerics="gaussian", require="tolerance"))
    assert found.judgement.verdict is Verdict.BASELINE_WRONG
    first = found.judgement.first_divergence
    assert first is not None
    assert (first.stage, first.field) == (Stage.EXPERTS, "w2")


def test_combine_that_keeps_the_ids_of_its_first_call_is_seen_in_the_next() -> None:
    found = outcome(brought(transport="KeepsIds", numerics="exact", topk=1))
    assert found.judgement.verdict is Verdict.CORRUPT
    first = found.judgement.first_divergence
    assert first is not None
    assert (first.arm, first.stage) == (Arm.CONTROL, Stage.COMBINE)


def test_tokens_in_the_same_memory_in_each_call_are_those_of_their_own_arm() -> None:
    assert outcome(brought(transport="OneBuffer")).judgement.verdict is Verdict.PASS
    found = outcome(brought(transport="OneBufferTruncated", numerics="exact"))
    assert found.judgement.verdict is Verdict.CORRUPT
    assert found.judgement.first_divergence is not None
    assert found.judgement.first_divergence.arm == Arm.TRUNCATED


def test_fault_of_a_plugin_is_injected_counted_and_attributed() -> None:
    found = outcome(brought(numerics="exact", inject="tests.brought_plugins:Doubled:rank=1,factor=3,arm=padded"))
    assert found.gathered is not None
    assert found.gathered.observations[1].injected == {"0": 1}
    assert found.judgement.verdict is Verdict.BASELINE_WRONG
    assert found.judgement.first_divergence is not None
    assert (found.judgement.first_divergence.stage, found.judgement.first_divergence.rank) == (Stage.COMBINE, 1)


AITER: dict[str, Any] = {"experts": "aiter", "emulate": True, "numerics": "exact", "limit": "max-recv"}


def test_caller_of_a_plugin_is_the_arm_production_and_is_named_in_the_record() -> None:
    found = outcome(brought(caller="Plain", **AITER))
    assert found.gathered is not None
    assert found.judgement.verdict is Verdict.PASS, found.judgement.reasons
    caller = found.gathered.observations[0].caller
    assert caller is not None
    assert caller.text.label == "acme 1.2"
    assert Arm.PRODUCTION in found.gathered.observations[0].kernels


def test_caller_of_a_plugin_that_does_not_cut_at_the_limit_is_not_passed() -> None:
    found = outcome(brought(caller="CutsNothing", **AITER))
    assert found.judgement.verdict is Verdict.CORRUPT
    assert "production (acme 1.2)" in found.judgement.reasons[0].message


def contract_of(session: Session, case: Case) -> str:
    """The rule that a case breaks on this rank."""
    try:
        run_case(session, case)
    except BrokenContract as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("name", "rule"),
    [("Anonymous", "caller.text"), ("makes_nothing", "caller.made"), ("raises_in_make", "caller.made")],
)
def test_caller_that_breaks_a_rule_is_named(name: str, rule: str) -> None:
    for told in on_ranks(RANKS, contract_of, brought(caller=name, **AITER)):
        assert told.startswith(f"caller tests.brought_plugins:{name} breaks {rule}: ")


@pytest.mark.parametrize(
    ("parts", "verdict", "message"),
    [
        ({"inject": "tests.brought_plugins:Doubled:factor=9"}, Verdict.INVALID, "factor = '9'; allowed are whole"),
        ({"inject": "tests.brought_plugins:Same"}, Verdict.INVALID, "is no subclass of distbench.plugins.Fault"),
        ({"inject": "tests.brought_plugins:Nameless"}, Verdict.INVALID, "the class has no name; set name, bug and"),
        ({"inject": "tests.brought_plugins:Missing"}, Verdict.INVALID, "no attribute 'Missing'"),
        ({"transport": "OPTIONED", "transport_option": "factor=0"}, Verdict.INVALID, "optioned refuses it"),
        ({"transport": "missing"}, Verdict.INVALID, "no attribute 'missing'"),
        ({"caller": "CALLER_ON_DEVICES", **AITER}, Verdict.UNSUPPORTED, "states no support of device = cpu"),
        ({"transport": "ON_DEVICES"}, Verdict.UNSUPPORTED, "states no support of device = cpu"),
        ({"transport": "NO_FP8", "dispatch_dtype": "fp8"}, Verdict.UNSUPPORTED, "no support of dispatch_dtype = fp8"),
        ({"experts": "SAME", "experts_option": "a=1"}, Verdict.INVALID, "same has no such option"),
    ],
)
def test_refusal_of_a_plugin_ends_the_case_on_all_ranks(parts: dict[str, str], verdict: Verdict, message: str) -> None:
    found = on_ranks(RANKS, outcome_of, brought(**parts))
    for one in found:
        assert one.judgement.verdict is verdict
        assert message in one.judgement.reasons[0].message
