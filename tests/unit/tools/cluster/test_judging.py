"""A planted fault is named; no healthy node or link is."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbench.case.stages import LAYER_STAGES, Stage
from distbench.tools.cluster.attribution import ClusterFinding, GroupRun, name_faults
from distbench.tools.cluster.plan import STEPS, Step, rounds_of
from distbench.tools.cluster.stragglers import LEAST_SLOWDOWN, name_stragglers, not_judged

KEYS = [f"case {number}" for number in range(8)]
Group = tuple[str, ...]


def names(count: int) -> list[str]:
    return [f"node{number}" for number in range(count)]


def trials(count: int, failing: Callable[[Step, Group], bool]) -> list[GroupRun]:
    return [
        GroupRun(step=step, nodes=group, exit_code=3 if failing(step, group) else 0, verdict="HANG", reason="why")
        for step in STEPS
        for one in rounds_of(step, names(count))
        for group in one
    ]


def named(findings: list[ClusterFinding]) -> set[tuple[str, frozenset[str]]]:
    return {(found.kind, frozenset(found.nodes)) for found in findings}


@given(data=st.data(), count=st.integers(3, 12))
def test_failing_nodes_and_links_are_named_and_no_healthy_one(data: st.DataObject, count: int) -> None:
    nodes = names(count)
    alone = set(data.draw(st.lists(st.sampled_from(nodes), max_size=count - 1, unique=True)))
    rest = [node for node in nodes if node not in alone]
    most = max(len(rest) - 2, 0)
    cut_off = set(data.draw(st.lists(st.sampled_from(rest), max_size=most, unique=True))) if most else set()
    healthy = [node for node in rest if node not in cut_off]
    links = list(combinations(healthy, 2))
    # each healthy node has a partner with which it passes
    broken = {frozenset(links[0])} if len(healthy) > 2 and data.draw(st.booleans()) else set()

    def failing(step: Step, group: Group) -> bool:
        if step == "nodes":
            return group[0] in alone
        bad = alone | cut_off
        return bool(bad & set(group)) or any(link <= set(group) for link in broken)

    expected = {("node", frozenset([node])) for node in alone | cut_off} | {("link", link) for link in broken}
    assert named(name_faults(trials(count, failing))) == expected


@pytest.mark.parametrize("count", [2, 3, 8])
def test_fault_shared_by_all_trials_is_common_and_names_no_node(count: int) -> None:
    assert named(name_faults(trials(count, lambda *_: True))) == {("common", frozenset())}
    assert named(name_faults(trials(count, lambda *_: False))) == set()
    together = named(name_faults(trials(count, lambda step, _: step == "all")))
    assert together == {("scale", frozenset(names(count)))}
    between = named(name_faults(trials(count, lambda step, _: step != "nodes")))
    assert between == ({("link", frozenset(names(2)))} if count == 2 else {("fabric", frozenset())})


def test_scale_fault_is_named_beside_a_node_that_was_left_out() -> None:
    found = [
        GroupRun(step="nodes", nodes=("a",), exit_code=1, verdict="CORRUPT"),
        *(GroupRun(step="nodes", nodes=(node,), exit_code=0, verdict="PASS") for node in "bc"),
        GroupRun(step="all", nodes=("b", "c"), exit_code=3, verdict="HANG"),
    ]
    assert named(name_faults(found)) == {("node", frozenset("a")), ("scale", frozenset("bc"))}


def test_evidence_of_a_finding_quotes_the_verdict_and_its_message() -> None:
    (found,) = name_faults(trials(4, lambda _, group: "node2" in group and len(group) == 2))[:1]
    assert found.evidence == "fails with each of its 3 partners: HANG: why"


def timed(count: int, seed: int, slowness: Callable[[str, Group], float], noise: float = 0.01) -> list[GroupRun]:
    """Trials with noisy times: each case's own time, multiplied by the slowness of its group in that stage."""
    rng = random.Random(seed)
    base = {(stage, key): math.exp(rng.gauss(5, 2)) for stage in LAYER_STAGES for key in KEYS}
    found = []
    for step in ("nodes", "pairs"):
        for group in (group for one in rounds_of(step, names(count)) for group in one):
            times: dict[str, dict[str, float]] = {
                stage: {key: base[stage, key] * slowness(stage, group) * math.exp(rng.gauss(0, noise)) for key in KEYS}
                for stage in LAYER_STAGES
            }
            found.append(GroupRun(step=step, nodes=group, exit_code=0, verdict="PASS", times=times))
    return found


@settings(deadline=None)
@given(count=st.integers(5, 12), seed=st.integers(0, 10**6), slow=st.integers(0, 4), by=st.floats(1.5, 10))
def test_slow_node_is_named_with_its_stage_and_no_other_node_is(count: int, seed: int, slow: int, by: float) -> None:
    node = f"node{slow}"
    findings = name_stragglers(
        timed(count, seed, lambda stage, group: by if node in group and stage == "experts" else 1.0)
    )
    assert named(findings) == {("slow node", frozenset([node]))}
    assert all("alone, experts: " in found.evidence for found in findings)


@settings(deadline=None)
@given(count=st.integers(5, 12), seed=st.integers(0, 10**6), by=st.floats(1.5, 10))
def test_slow_link_and_node_slow_only_in_pairs_are_named(count: int, seed: int, by: float) -> None:
    link = {"node0", "node1"}
    findings = name_stragglers(timed(count, seed, lambda _, group: by if set(group) == link else 1.0))
    assert named(findings) == {("slow link", frozenset(link))}
    findings = name_stragglers(timed(count, seed, lambda _, group: by if "node0" in group and len(group) > 1 else 1.0))
    assert named(findings) == {("slow node", frozenset(["node0"]))}
    assert all("in pairs, " in found.evidence for found in findings)


def nodes_that_differ(count: int, seed: int, slow: int = 0) -> list[GroupRun]:
    """Trials of nodes that differ by 2 % in each stage; the first `slow` are 30 % slower in their experts."""
    rng = random.Random(seed)
    level: dict[tuple[str, str], float] = {
        (stage, node): math.exp(rng.gauss(0, 0.02)) for stage in LAYER_STAGES for node in names(count)
    }
    for node in names(slow):
        level[Stage.EXPERTS, node] *= 1.3
    return timed(count, seed, lambda stage, group: max(level[stage, node] for node in group))


@pytest.mark.parametrize("count", [5, 8, 16])
def test_healthy_nodes_with_natural_differences_are_rarely_named_slow(count: int) -> None:
    rounds = 30
    noisy = sum(bool(name_stragglers(timed(count, seed, lambda *_: 1.0, noise=0.2))) for seed in range(rounds))
    differing = sum(bool(name_stragglers(nodes_that_differ(count, seed))) for seed in range(rounds))
    assert max(noisy, differing) <= 2


@pytest.mark.parametrize(("count", "slow", "found"), [(8, 1, 24), (16, 1, 30), (16, 3, 30)])
def test_slow_nodes_are_named_among_nodes_with_natural_differences(count: int, slow: int, found: int) -> None:
    right = {("slow node", frozenset([node])) for node in names(slow)}
    rounds = [named(name_stragglers(nodes_that_differ(count, seed, slow))) for seed in range(30)]
    assert rounds.count(right) >= found


def test_slowdown_below_the_least_detectable_one_is_not_named() -> None:
    def slower(by: float) -> list[ClusterFinding]:
        return name_stragglers(timed(8, 0, lambda _, group: by if "node0" in group else 1.0, noise=1e-4))

    assert slower(LEAST_SLOWDOWN - 0.01) == []
    assert named(slower(LEAST_SLOWDOWN + 0.01)) == {("slow node", frozenset(["node0"]))}


def test_pair_times_without_single_node_times_are_not_judged() -> None:
    pairs = [trial for trial in timed(8, 0, lambda _, group: 9.0 if "node0" in group else 1.0) if trial.step == "pairs"]
    assert name_stragglers(pairs) == []
    assert not_judged(pairs) == [
        "slow links: a pair is compared with its nodes alone, which the plan lacks; add the step nodes"
    ]


def test_four_nodes_are_too_few_to_name_a_slow_one() -> None:
    assert name_stragglers(timed(4, 0, lambda _, group: 9.0 if "node0" in group else 1.0)) == []
