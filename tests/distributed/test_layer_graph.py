"""Replays of the whole layer in one graph, with a capture emulated on the CPU: a wrong replay is never a PASS."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from torch import Tensor

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.experts.base import Experts
from distbench.pipeline.run_case import run_case
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.ranks import on_ranks

Damage = Callable[[int, Tensor], object]

REPLAYS = 10


def run_with_graph(session: Session, case: Case, damage: Damage | None) -> Outcome | None:
    mine = damage if session.rank == 1 else None
    module = "distbench.pipeline.layer_graph"

    def captured(layer: Callable[[], Tensor]) -> Any:
        output, made = layer(), []

        def replay() -> None:
            output.copy_(layer())
            made.append(1)
            if mine is not None:
                mine(len(made), output)

        return SimpleNamespace(graph=SimpleNamespace(replay=replay), output=output)

    def plain(_: Session, experts: Experts, *__: object) -> Experts:
        return experts

    with (
        patch(f"{module}._captured", captured),
        patch(f"{module}._times", lambda *_: (1.0, 2.0)),
        patch("distbench.pipeline.run_case._graphed", plain),
    ):
        return run_case(session, case)


def replayed(case: Case, damage: Damage | None) -> Outcome:
    outcome: Outcome = on_ranks(2, run_with_graph, case, damage)[0]
    assert outcome.gathered is not None
    return outcome


def layer_case(**keys: Any) -> Case:
    return tiny_case(2, transport="mori", emulate=True, graph="layer", **keys)


@pytest.mark.parametrize("keys", [{}, {"numerics": "gaussian", "require": "tolerance"}, {"tokens": (9, 0)}])
def test_correct_replays_of_the_layer_pass(keys: dict[str, Any]) -> None:
    outcome = replayed(layer_case(**keys), None)
    assert outcome.judgement.verdict.value == "PASS", outcome.judgement.reasons
    assert outcome.gathered is not None
    for record in outcome.gathered.observations:
        assert [one.arm for one in record.layer_graphs] == ["padded", "truncated"]
        assert {len(one.replays) + one.skipped for one in record.layer_graphs} == {REPLAYS}
    assert sum(reason.code == "layer-graph" for reason in outcome.judgement.reasons) == 2


def a_sign(number: int, tokens: Tensor) -> None:
    if number == 3:
        tokens[0, 5] = 1.0 - tokens[0, 5]


def test_wrong_token_of_one_replay_is_baseline_wrong_with_its_rank() -> None:
    outcome = replayed(layer_case(limit="off"), a_sign)
    assert outcome.judgement.verdict.value == "BASELINE_WRONG"
    (told,) = [reason for reason in outcome.judgement.reasons if "a replay of the layer's graph" in reason.message]
    assert told.rank == 1


def test_replay_that_sends_more_rows_than_the_arm_keeps_is_skipped_on_all_ranks() -> None:
    outcome = replayed(layer_case(limit="max-recv", routing="hot-rank:0"), None)
    assert outcome.judgement.verdict.value == "PASS"
    assert outcome.gathered is not None
    padded, cut = zip(*(record.layer_graphs for record in outcome.gathered.observations), strict=True)
    assert {one.skipped for one in padded} == {0}
    assert len({one.skipped for one in cut}) == 1
