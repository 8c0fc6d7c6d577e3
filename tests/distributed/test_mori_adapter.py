"""The adapter of MoRI on real ranks: the nodes that it tells MoRI of."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest

from distbench.case import Case
from distbench.errors import Verdict
from distbench.rank import run_case
from distbench.session import Session
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.ranks import on_ranks


def mori_case(ranks: int = 4, **values: Any) -> Case:
    return tiny_case(ranks, transport="mori", emulate=True, **values)


def on_nodes(session: Session, case: Case, nodes: tuple[int, ...]) -> Outcome | None:
    """Run `case` as if each rank were on a node with as many ranks as `nodes` says for it."""
    session.enter(case.ep_size)
    with patch.object(session, "local_ranks", nodes[session.rank]):
        return run_case(session, case)


@pytest.mark.parametrize(("nodes", "per_node", "kernel"), [((4,) * 4, 4, "IntraNode"), ((2,) * 4, 2, "InterNodeV1LL")])
def test_a_node_is_what_the_launch_has_there(nodes: tuple[int, ...], per_node: int, kernel: str) -> None:
    outcome: Outcome = on_ranks(4, on_nodes, mori_case(), nodes)[0]
    assert outcome.judgement.verdict is Verdict.PASS
    assert outcome.gathered is not None
    facts = outcome.gathered.observations[0].transport
    assert (facts["gpu_per_node"], facts["nodes"], facts["kernel"]) == (per_node, 4 // per_node, kernel)


def test_nodes_with_unlike_numbers_of_ranks_are_refused_by_all() -> None:
    for outcome in on_ranks(4, on_nodes, mori_case(), (3, 3, 3, 1)):
        assert outcome.judgement.verdict is Verdict.INVALID
        assert "ranks disagree on the number of ranks on their nodes: rank 3 not as rank 0" in str(outcome.judgement)
