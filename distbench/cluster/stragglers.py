"""The slow node or link, from the distribution of times.

The rule is Iglewicz and Hoaglin's modified z-score (How to Detect and Handle Outliers, 1993): a group is slow whose
0.6745 (x - median) / MAD is above 3.5. x is the median over cases and arms of log(time / median of all groups), for
each stage; MAD is that over the groups, or that of a group's own cases and arms about its x where this is larger, so
that nobody is slow by less than the measurement's own scatter.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence

import msgspec

from distbench.cluster.faults import Finding, Kind, Trial
from distbench.cluster.plan import Group

THRESHOLD = 3.5
LEAST_GROUPS = 5
"""Groups below which there is no distribution to speak of."""
LEAST_TIMES = 4
"""Cases and arms below which the scatter of a group is not known."""

_NORMAL_MAD = 0.6745


class _Scores(msgspec.Struct, frozen=True):
    """log(time / median of all) of each group, and the scatter of a group's own times about it."""

    values: dict[Group, float]
    scatter: float


def name_stragglers(trials: Sequence[Trial]) -> list[Finding]:
    """Return the slow nodes, by the times alone or else by those in pairs, and the links slower than both their ends.

    Trials that failed have no say. Fewer than LEAST_GROUPS nodes, or LEAST_TIMES cases and arms, name nobody.
    """
    findings: list[Finding] = []
    passed = [trial for trial in trials if not trial.failed]
    for stage in dict.fromkeys(stage for trial in passed for stage in trial.times):
        alone = _scores([trial for trial in passed if trial.step == "nodes"], stage)
        pairs = _scores([trial for trial in passed if trial.step == "pairs"], stage)
        slow = _outliers(alone.values, alone.scatter) if alone else {}
        findings += [_finding("slow node", group, f"alone, {stage}", slow[group]) for group in slow]
        if pairs:
            findings += _slow_in_pairs(pairs, stage, {group[0] for group in slow})
    return findings


def not_judged(trials: Sequence[Trial]) -> list[str]:
    """Return in words why slow nodes or links were not looked for, of the steps that were run."""
    told = []
    for step, what in (("nodes", "slow nodes"), ("pairs", "slow links")):
        own = [trial for trial in trials if trial.step == step]
        passed = [trial for trial in own if not trial.failed]
        nodes = {node for trial in passed for node in trial.nodes}
        stages = list(dict.fromkeys(stage for trial in passed for stage in trial.times))
        thin = [stage for stage in stages if len(_shared_keys(passed, stage)) < LEAST_TIMES]
        if own and len(nodes) < LEAST_GROUPS:
            told.append(f"{what}: {len(nodes)} nodes pass, at least {LEAST_GROUPS} are needed to tell who is slow")
        elif own and (thin or not stages):
            which = f" in {', '.join(thin)}" if stages else ""
            told.append(f"{what}{which}: fewer than {LEAST_TIMES} cases and arms are timed in all groups")
    return told


def _slow_in_pairs(pairs: _Scores, stage: str, known: set[str]) -> list[Finding]:
    """A pair is as slow as its slower end; what is slower than that is the link."""
    nodes = {node for group in pairs.values for node in group}
    if len(nodes) < LEAST_GROUPS:
        return []
    ends = {node: statistics.median(value for group, value in pairs.values.items() if node in group) for node in nodes}
    slow = _outliers({(node,): value for node, value in sorted(ends.items())}, pairs.scatter)
    rest = {group: value - max(ends[node] for node in group) for group, value in pairs.values.items()}
    links = _outliers(rest, pairs.scatter)
    found = [_finding("slow node", one, f"in pairs, {stage}", slow[one]) for one in slow if one[0] not in known]
    return found + [_finding("slow link", one, stage, links[one]) for one in links]


def _scores(trials: Sequence[Trial], stage: str) -> _Scores | None:
    """Return None where groups or the times that all of them have are too few."""
    if len(trials) < LEAST_GROUPS:
        return None
    times = {trial.nodes: trial.times.get(stage, {}) for trial in trials}
    keys = _shared_keys(trials, stage)
    if len(keys) < LEAST_TIMES:
        return None
    middle = {key: statistics.median(math.log(own[key]) for own in times.values()) for key in keys}
    ratios = {group: [math.log(own[key]) - middle[key] for key in keys] for group, own in times.items()}
    values = {group: statistics.median(own) for group, own in ratios.items()}
    return _Scores(values, statistics.median(_mad(own) for own in ratios.values()))


def _shared_keys(trials: Sequence[Trial], stage: str) -> set[str]:
    """Return the cases and arms that all groups have times of."""
    return set.intersection(*(set(trial.times.get(stage, {})) for trial in trials))


def _outliers(values: Mapping[Group, float], scatter: float) -> dict[Group, tuple[float, float]]:
    """Return for each group that is slow how many times slower than the median it is, and its modified z-score."""
    if len(values) < LEAST_GROUPS:
        return {}
    middle = statistics.median(values.values())
    spread = max(_mad(list(values.values())), scatter)
    if spread == 0:
        return {}
    scores = {group: _NORMAL_MAD * (value - middle) / spread for group, value in values.items()}
    return {group: (math.exp(values[group] - middle), score) for group, score in scores.items() if score > THRESHOLD}


def _mad(values: Sequence[float]) -> float:
    middle = statistics.median(values)
    return statistics.median(abs(value - middle) for value in values)


def _finding(kind: Kind, nodes: Group, where: str, found: tuple[float, float]) -> Finding:
    times, score = found
    evidence = f"{where}: {times:.2f} times the median, modified z-score {score:.1f}, threshold {THRESHOLD}"
    return Finding(kind=kind, nodes=nodes, evidence=evidence)
