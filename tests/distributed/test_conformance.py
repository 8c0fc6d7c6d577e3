"""The suite conformance: held by plugins that keep the rules, and each rule broken by one that does not."""

from __future__ import annotations

from typing import Any

import pytest

from distbench.case.entry import Entry
from distbench.case.resolve import FLAGS, Layer
from distbench.case.suite import load_suite
from distbench.distributed.session import Session
from distbench.errors import BrokenContract, Verdict
from distbench.pipeline.run_case import run_case
from distbench.testing.conformance import RULES, SUITE
from tests.ranks import on_ranks

RANKS = 2


def entry_of(rule: str, **parts: str) -> Entry:
    flags = {"device": "cpu"} | {
        key: f"tests.brought_plugins:{value}" if key in ("transport", "experts") else value
        for key, value in parts.items()
    }
    return {one.name: one for one in load_suite(SUITE, RANKS, [Layer(FLAGS, flags)]).entries}[rule]


def ending_of(session: Session, entry: Entry) -> str:
    """Verdict of a case on this rank, or the rule of the contract that it breaks there."""
    try:
        found = run_case(session, entry.case)
    except BrokenContract as error:
        return str(error)
    return "" if found is None else found.judgement.verdict.value


def endings(rule: str, **parts: Any) -> tuple[str, ...]:
    return tuple(on_ranks(RANKS, ending_of, entry_of(rule, **parts)))


def test_suite_has_a_case_for_each_rule() -> None:
    assert [one.name for one in load_suite(SUITE, 4).entries] == list(RULES)


@pytest.mark.parametrize("rule", RULES)
def test_plugins_that_keep_the_rules_hold_each(rule: str) -> None:
    wanted = {"overflow": Verdict.OVERFLOW.value, "lossy-cut": Verdict.UNDER_LIMIT.value}
    assert endings(rule, transport="SPOILS", experts="SAME")[0] == wanted.get(rule, Verdict.PASS.value)


@pytest.mark.parametrize("rule", [rule for rule in RULES if rule not in ("overflow", "cut", "lossy-cut")])
def test_transport_that_breaks_one_rule_is_caught_by_its_case(rule: str) -> None:
    found = endings(rule, transport="SPOILS", transport_option=f"rule={rule}")
    if rule == "no-tokens":
        assert "breaks combine.shape: tokens: [1, 256] instead of [0, 256]" in found[0]
    else:
        assert found[0] in (Verdict.BASELINE_WRONG.value, Verdict.CORRUPT.value, Verdict.NONDETERMINISTIC.value)


@pytest.mark.parametrize("rule", ["cut", "lossy-cut"])
def test_experts_that_break_a_rule_of_the_cut_are_caught_by_its_case(rule: str) -> None:
    assert endings(rule, experts="SpoilsRows")[0] == Verdict.CORRUPT.value
