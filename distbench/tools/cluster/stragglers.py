"""Attribution of slowness to a node or link, from the distribution of times.

For each stage x is the median over cases and arms of log(time / median of all groups); for a pair, its excess over the
slower of its nodes alone. The slowest is tested against the others by Student's t, as Grubbs does (Ann. Math. Stat. 21,
1950): its distance from their mean in their standard deviations. Of n values that differ by chance alone, the largest
exceeds the quantile of p / n with a probability of at most p. Then the next slowest is tested against the rest, and so
on, so that one slow node does not mask another (Rosner's generalised ESD, Technometrics 25, 1983). All these tests, of
all stages, nodes and links, share ALARMS.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence

import msgspec

from distbench.tools.cluster.attribution import ClusterFinding, GroupRun, Kind
from distbench.tools.cluster.plan import Group, Step
from distbench.utils.stats import student_quantile

ALARMS = 0.01
"""Probability that any node or link is called slow where they differ by chance alone."""
LEAST_SLOWDOWN = 1.05
"""Ratio to the mean of the others below which none is called slow, however significant."""
LEAST_GROUPS = 5
"""Number of groups below which there is no distribution to test."""
LEAST_TIMES = 4
"""Number of cases and arms below which a single one would decide."""


class _Compared(msgspec.Struct, frozen=True):
    """Values x compared in one stage, of nodes or of links, between `nodes` nodes in all."""

    kind: Kind
    stage: str
    alone: bool
    nodes: int
    values: dict[Group, float]


class _Outlier(msgspec.Struct, frozen=True):
    """Ratio to the others, and the distance from them in their standard deviations."""

    times: float
    t: float
    needed: float


def name_stragglers(trials: Sequence[GroupRun]) -> list[ClusterFinding]:
    """Slow nodes, by the times alone or else by those in pairs, and links slower than both their ends.

    Failed trials are not counted. With fewer than LEAST_GROUPS nodes, or LEAST_TIMES cases and arms, none is named.
    """
    passed = [trial for trial in trials if not trial.failed]
    stages = dict.fromkeys(stage for trial in passed for stage in trial.times)
    compared = [one for stage in stages for one in _compared(passed, stage)]
    known: set[tuple[str, Group]] = set()
    findings: list[ClusterFinding] = []
    for one in compared:
        for group, found in _outliers(one, ALARMS / len(compared)).items():
            if (one.stage, group) not in known:
                findings.append(_finding(one, group, found))
                known.add((one.stage, group))
    return findings


def not_judged(trials: Sequence[GroupRun]) -> list[str]:
    """Reasons why slow nodes or links were not looked for, in the steps that were run."""
    told = []
    for step, what in (("nodes", "slow nodes"), ("pairs", "slow links")):
        own = [trial for trial in trials if trial.step == step]
        passed = [trial for trial in own if not trial.failed]
        nodes = {node for trial in passed for node in trial.nodes}
        stages = list(dict.fromkeys(stage for trial in passed for stage in trial.times))
        thin = [stage for stage in stages if len(_shared_keys(passed, stage)) < LEAST_TIMES]
        if own and step == "pairs" and not any(trial.step == "nodes" for trial in trials):
            told.append(f"{what}: a pair is compared with its nodes alone, which the plan lacks; add the step nodes")
        elif own and len(nodes) < LEAST_GROUPS:
            told.append(f"{what}: {len(nodes)} nodes pass, at least {LEAST_GROUPS} are needed to tell which is slow")
        elif own and (thin or not stages):
            which = f" in {', '.join(thin)}" if stages else ""
            told.append(f"{what}{which}: fewer than {LEAST_TIMES} cases and arms are timed in all groups")
    return told


def _compared(passed: Sequence[GroupRun], stage: str) -> Iterator[_Compared]:
    """Yield the nodes alone, the nodes by the median of their pairs, and the links by their excess over that."""
    alone, pairs = (_values([trial for trial in passed if trial.step == step], stage) for step in ("nodes", "pairs"))
    if not alone:
        return
    yield _Compared("slow node", stage, alone=True, nodes=len(alone), values=alone)
    nodes = sorted({node for group in pairs for node in group})
    if len(nodes) < LEAST_GROUPS:
        return
    above = {group: value - max(alone[node,] for node in group) for group, value in pairs.items()}
    ends: dict[Group, float] = {
        (node,): statistics.median(value for group, value in above.items() if node in group) for node in nodes
    }
    yield _Compared("slow node", stage, alone=False, nodes=len(nodes), values=ends)
    rest = {group: value - max(ends[node,] for node in group) for group, value in above.items()}
    yield _Compared("slow link", stage, alone=False, nodes=len(nodes), values=rest)


def _values(trials: Sequence[GroupRun], stage: str) -> dict[Group, float]:
    """Value x of each group; empty where groups, or the times common to all of them, are too few."""
    if len(trials) < LEAST_GROUPS:
        return {}
    times = {trial.nodes: trial.times.get(stage, {}) for trial in trials}
    keys = _shared_keys(trials, stage)
    if len(keys) < LEAST_TIMES:
        return {}
    middle = {key: statistics.median(math.log(own[key]) for own in times.values()) for key in keys}
    return {group: statistics.median(math.log(own[key]) - middle[key] for key in keys) for group, own in times.items()}


def relative_times(trials: Sequence[GroupRun], step: Step, stage: str) -> dict[Group, float]:
    """Time of each group of a step that passed, as a multiple of the median of all; empty where they are not judged."""
    values = _values([trial for trial in trials if trial.step == step and not trial.failed], stage)
    return {group: math.exp(value) for group, value in values.items()}


def _shared_keys(trials: Sequence[GroupRun], stage: str) -> set[str]:
    """Cases and arms of which all groups have times."""
    return set.intersection(*(set(trial.times.get(stage, {})) for trial in trials))


def _outliers(compared: _Compared, alarms: float) -> dict[Group, _Outlier]:
    """Groups that are slower than the remaining ones by more than chance explains.

    At most a third are. Links share nodes, so their scatter has no more degrees of freedom than that of the nodes.
    """
    ordered = sorted(compared.values, key=compared.values.__getitem__)
    values = [compared.values[group] for group in ordered]
    below = list(_moments(values))
    found: list[Group] = []
    limit = math.inf
    most = (compared.nodes - 2) // 3
    for slowest in range(1, most + 1):
        count = len(values) - slowest
        needed = student_quantile(alarms / most / (count + 1), compared.nodes - slowest - 1)
        if _distance(values[count], *below[count]) > needed:
            found, limit = ordered[count:], needed
    mean, deviation, count = below[len(values) - len(found)]
    outliers = {
        group: _Outlier(
            math.exp(compared.values[group] - mean), _distance(compared.values[group], mean, deviation, count), limit
        )
        for group in reversed(found)
    }
    return {group: one for group, one in outliers.items() if one.times >= LEAST_SLOWDOWN}


def _moments(values: Sequence[float]) -> Iterator[tuple[float, float, int]]:
    """Yield the mean, the standard deviation and the number of the first 0, 1, 2, … values (Welford)."""
    mean = squares = 0.0
    yield mean, 0.0, 0
    for count, value in enumerate(values, 1):
        before, mean = mean, mean + (value - mean) / count
        squares += (value - before) * (value - mean)
        yield mean, math.sqrt(squares / max(count - 1, 1)), count


def _distance(value: float, mean: float, deviation: float, count: int) -> float:
    """Student's t of one more value against `count` others."""
    above = value - mean
    scale = deviation * math.sqrt(1 + 1 / count)
    return above / scale if scale else math.copysign(math.inf, above) if above else 0.0


def _finding(compared: _Compared, group: Group, found: _Outlier) -> ClusterFinding:
    place = "alone, " if compared.alone else "in pairs, " if compared.kind == "slow node" else ""
    evidence = f"{found.times:.2f} times the others, Student's t {found.t:.1f}, needed {found.needed:.1f}"
    return ClusterFinding(kind=compared.kind, nodes=group, evidence=f"{place}{compared.stage}: {evidence}")
