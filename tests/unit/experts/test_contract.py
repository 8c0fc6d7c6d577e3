"""Plugin's experts that break their contract: each rule is named."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from distbench.case.contract import RULES
from distbench.case.plugins import Plugin
from distbench.errors import BrokenContract, Unsupported
from distbench.experts.base import ExpertInput, ExpertsContext, ExpertWeights
from distbench.experts.contract import CheckedExperts
from distbench.experts.selection.choice import KernelChoice
from distbench.pipeline.inputs import workload_for
from tests import brought_plugins
from tests.cases import tiny_case

CALLS = ("make", "warm_up", "selection", "roundings", "call")
BROKEN = {
    "raises_in_make_of_experts": ("experts.made", "make"),
    "makes_nothing": ("experts.made", "make"),
    "TensorAbout": ("experts.facts", "make"),
    "RaisesInWarmUp": ("experts.returns", "warm_up"),
    "ChoosesNothing": ("experts.selection", "selection"),
    "ChoosesForOthers": ("experts.selection", "selection"),
    "NamesRoundings": ("experts.roundings", "roundings"),
    "RaisesInCall": ("experts.returns", "call"),
    "ReturnsLiveRows": ("experts.shape", "call"),
    "ReturnsNothing": ("experts.shape", "call"),
    "ReturnsFloat32": ("experts.dtype", "call"),
    "ReturnsElsewhere": ("experts.device", "call"),
}
"""Broken experts: the rule, and the call that breaks it."""


def steps(plugin: Plugin) -> Iterator[str]:
    """Calls of the experts, one at a time; yields each as it has passed."""
    case = tiny_case(1, tokens=(3,))
    workload = workload_for(case, torch.device("cpu"))
    batch = workload.tokens(0)
    weights = ExpertWeights(*workload.local_weights(0), torch.ones(case.num_experts, dtype=torch.int32))
    hidden, slots, ids = (torch.cat([part, part]) for part in (batch.hidden, batch.weights, batch.ids))
    given = ExpertInput(hidden, None, slots, ids, torch.tensor([3], dtype=torch.int32))
    experts = CheckedExperts(ExpertsContext(case), plugin)
    yield "make"
    experts.warm_up(weights, (6,))
    yield "warm_up"
    choice = experts.selection(6)
    yield "selection"
    experts.roundings(choice)
    yield "roundings"
    experts(given, weights)
    yield "call"


def test_experts_that_keep_the_contract_pass_every_check() -> None:
    assert tuple(steps(brought_plugins.SAME)) == CALLS


@pytest.mark.parametrize("name", BROKEN)
def test_broken_rule_is_named_in_the_call_that_breaks_it(name: str) -> None:
    rule, call = BROKEN[name]
    plugin = Plugin(make=getattr(brought_plugins, name))
    passed: list[str] = []
    with pytest.raises(BrokenContract, match=f"^experts reference break {rule}: [^\n]+$"):
        passed.extend(steps(plugin))
    assert len(passed) == CALLS.index(call)


def test_every_rule_of_experts_has_a_broken_example() -> None:
    assert {rule for rule in RULES if rule.startswith("experts.")} == {rule for rule, _ in BROKEN.values()}


def test_device_that_experts_do_not_state_is_unsupported_before_they_compute() -> None:
    with pytest.raises(Unsupported, match="experts reference: states no support of device = cpu"):
        list(steps(Plugin(make=brought_plugins.Same, devices=("cuda",))))


def test_kernel_that_only_has_a_name_is_labelled_by_it_and_equals_itself_at_any_number_of_rows() -> None:
    first, second = KernelChoice.named(8, "acme v1"), KernelChoice.named(9, "acme v1")
    assert first.label == "acme v1"
    assert first.same_kernel(second)
    assert not first.same_kernel(KernelChoice.named(8, "acme v2"))
    assert not first.same_kernel(KernelChoice.named(8, "acme v1", varies=True))
