"""Graph replays in a whole case, with graphs emulated on the CPU: a wrong replay is never a PASS."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import pytest
from torch import Tensor

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.experts.base import Experts
from distbench.pipeline.graphs import GraphedExperts
from distbench.pipeline.run_case import run_case
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.distributed.test_timing import only_the_cut_is_atomic, rounding_case
from tests.graphs import Capturable, fake_graphs
from tests.ranks import on_ranks

Damage = Callable[[int, Tensor], object]


def run_with_graphs(session: Session, case: Case, damage: Damage | None) -> Outcome | None:
    mine = damage if session.rank == 1 else None

    def graphed(_: Session, experts: Experts, *__: object) -> GraphedExperts:
        return GraphedExperts(Capturable(experts, mine))

    with fake_graphs(), patch("distbench.pipeline.run_case._graphed", graphed):
        return run_case(session, case)


def a_sign(live: int, rows: Tensor) -> None:
    if live == 1:  # no pass of these cases has one row
        rows[0, 3].neg_()


def a_row_of_zeros(live: int, rows: Tensor) -> None:
    if live == 1:
        rows[0].zero_()


def replayed(case: Case, damage: Damage | None) -> Outcome:
    outcome: Outcome = on_ranks(2, run_with_graphs, case, damage)[0]
    assert outcome.gathered is not None
    assert all(len(record.replays) == 4 for record in outcome.gathered.observations)
    return outcome


def wrong_and_near(outcome: Outcome) -> tuple[int, int]:
    assert outcome.gathered is not None
    replays = [replay for record in outcome.gathered.observations for replay in record.replays]
    return sum(replay.wrong for replay in replays), sum(replay.near for replay in replays)


def test_correct_graph_replays_pass() -> None:
    outcome = replayed(tiny_case(2, graph=True), None)
    assert outcome.judgement.verdict.value == "PASS"
    assert wrong_and_near(outcome) == (0, 0)


@pytest.mark.parametrize("values", [{}, {"limit": "off"}, {"inject": "flipped-expert-bit:rank=0,arm=truncated"}])
def test_damaged_graph_replay_is_corrupt(values: dict[str, str]) -> None:
    outcome = replayed(tiny_case(2, graph=True, **values), a_sign)
    assert outcome.judgement.verdict.value == "CORRUPT"
    assert wrong_and_near(outcome) == (1, 0)
    told = [reason for reason in outcome.judgement.reasons if "graph replay with 1 other live rows" in reason.message]
    assert [(reason.code, reason.rank) for reason in told] == [("experts-differs", 1)]


@pytest.mark.parametrize(
    ("mode", "require", "verdict"),
    [
        (only_the_cut_is_atomic, "tolerance", "PASS"),
        (only_the_cut_is_atomic, "bitwise", "DRIFT"),
        (lambda _: "atomic", "tolerance", "PASS"),
        (lambda _: "atomic", "bitwise", "NONDETERMINISTIC"),
    ],
)
def test_graph_replays_of_an_atomic_kernel_are_judged_by_the_tolerance(
    tmp_path: Path, mode: Callable[[int], str], require: str, verdict: str
) -> None:
    case = rounding_case(tmp_path, mode, require=require, iterations=0, graph=True)
    outcome = replayed(case, None)
    wrong, near = wrong_and_near(outcome)
    assert not wrong
    assert near
    assert outcome.judgement.verdict.value == verdict
    if mode is only_the_cut_is_atomic:
        assert "replay-differs" in {reason.code for reason in outcome.judgement.reasons}


@pytest.mark.parametrize(
    ("mode", "damage"),
    [(only_the_cut_is_atomic, a_row_of_zeros), (lambda _: "reduce", a_sign)],
    ids=["beyond the tolerance", "one sign of an ordered sum"],
)
def test_gaussian_graph_replay_that_no_summation_order_explains_is_corrupt(
    tmp_path: Path, mode: Callable[[int], str], damage: Damage
) -> None:
    case = rounding_case(tmp_path, mode, require="tolerance", iterations=0, graph=True)
    outcome = replayed(case, damage)
    assert outcome.judgement.verdict.value == "CORRUPT"
    assert wrong_and_near(outcome)[0] == 1
    assert "graph replay with 1 other live rows" in outcome.judgement.reasons[0].message
    assert outcome.diagnosis[0].ranks == [1]
