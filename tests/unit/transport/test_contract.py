"""A plugin's transport that breaks its contract: each rule is named."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from distbench.case.contract import RULES
from distbench.case.plugins import Plugin
from distbench.errors import BrokenContract, Unsupported
from distbench.pipeline.inputs import workload_for
from distbench.transport.base import TransportContext
from distbench.transport.contract import CheckedTransport
from distbench.transport.sum_order import SumOrder
from tests import brought_plugins
from tests.cases import tiny_case

CALLS = ("make", "dispatch", "sources", "combine", "dispatch again")
BROKEN = {
    "raises_in_make": ("transport.made", "make"),
    "makes_nothing": ("transport.made", "make"),
    "WithoutCapacity": ("transport.made", "make"),
    "NoFacts": ("transport.facts", "make"),
    "TensorFacts": ("transport.facts", "make"),
    "RaisesInDispatch": ("dispatch.returns", "dispatch"),
    "ReturnsTuple": ("dispatch.type", "dispatch"),
    "ReturnsNumber": ("dispatch.type", "dispatch"),
    "ReturnsScales": ("dispatch.type", "dispatch"),
    "ShortBuffer": ("dispatch.shape", "dispatch"),
    "WideWeights": ("dispatch.dtype", "dispatch"),
    "ElsewhereIds": ("dispatch.device", "dispatch"),
    "Moves": ("dispatch.stays", "dispatch again"),
    "FlatSources": ("sources.shape", "sources"),
    "RaisesInSources": ("sources.shape", "sources"),
    "RaisesInCombine": ("combine.returns", "combine"),
    "NarrowTokens": ("combine.shape", "combine"),
    "NoTokens": ("combine.shape", "combine"),
    "Float32Tokens": ("combine.dtype", "combine"),
    "ElsewhereTokens": ("combine.device", "combine"),
}
"""Broken transports: the rule, and the call that breaks it."""


def context() -> TransportContext:
    case = tiny_case(1, tokens=(3,))
    like = workload_for(case, torch.device("cpu")).tokens(0)
    counts = torch.tensor([[3]])
    return TransportContext(case, None, 0, torch.device("cpu"), None, counts, like, None)  # type: ignore[arg-type]


def steps(name: str) -> Iterator[str]:
    """Calls of a pass and of the next dispatch, one at a time; yields each as it has passed."""
    given = context()
    transport = CheckedTransport(given, Plugin(make=getattr(brought_plugins, name), name="p", version="1"))
    yield "make"
    found = transport.dispatch(given.like)
    yield "dispatch"
    transport.sources()
    yield "sources"
    transport.combine(found.hidden, given.like.ids)
    yield "combine"
    transport.dispatch(given.like)
    yield "dispatch again"


def test_transport_that_keeps_the_contract_passes_every_check() -> None:
    assert tuple(steps("Alone")) == CALLS


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule_is_named_in_the_call_that_breaks_it(name: str) -> None:
    rule, call = BROKEN[name]
    passed: list[str] = []
    with pytest.raises(BrokenContract, match=f"^transport collective breaks {rule}: [^\n]+$"):
        passed.extend(steps(name))
    assert len(passed) == CALLS.index(call)


def test_every_rule_of_a_transport_has_a_broken_example() -> None:
    others = ("experts.", "caller.")
    assert {rule for rule in RULES if not rule.startswith(others)} == {rule for rule, _ in BROKEN.values()}


def test_errors_of_distbench_pass_as_they_are() -> None:
    def make(_: TransportContext) -> Any:
        message = "no such device"
        raise Unsupported(message)

    with pytest.raises(Unsupported, match=r"^no such device$"):
        CheckedTransport(context(), Plugin(make=make))


def test_reports_have_the_plugin_its_version_and_its_order_of_addition() -> None:
    transport = CheckedTransport(context(), Plugin(make=brought_plugins.Alone, name="p", version="1"))
    assert transport.facts["sum_order"] == SumOrder()._asdict()
    assert transport.about() == {"transport collective": {"name": "p", "version": "1"}}
