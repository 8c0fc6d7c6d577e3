"""Attribution of failures to a node or link, by the groups of nodes that failed and those that passed."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

import msgspec

from distbench.tools.cluster.plan import Group, Step

Kind = Literal["node", "link", "common", "fabric", "scale", "slow node", "slow link"]


class GroupRun(msgspec.Struct, frozen=True, kw_only=True):
    """One group of nodes and the ending of its suite.

    `devices` are the kinds of device of its ranks, in any case; empty without a result. `times[stage][case and arm]` is
    the slowest rank's median time in microseconds, of the cases that passed; `wall_s` is the group's time with
    start-up.
    """

    step: Step
    nodes: Group
    exit_code: int
    verdict: str
    reason: str = ""
    wall_s: float = 0.0
    devices: tuple[str, ...] = ()
    times: dict[str, dict[str, float]] = {}

    @property
    def failed(self) -> bool:
        """Whether the suite did not end as expected, or left no result."""
        return self.exit_code != 0


class ClusterFinding(msgspec.Struct, frozen=True, kw_only=True):
    """Conclusion from a pattern of failures, or of times: the node, or the two ends of a link, and the evidence."""

    kind: Kind
    nodes: Group
    evidence: str


def name_faults(trials: Sequence[GroupRun]) -> list[ClusterFinding]:
    """Nodes and links that the failures single out; none where all failed alike.

    A node is at fault that fails alone, or that passes alone and fails with every partner (at least two) that did not
    fail alone. A link is at fault where a pair fails and neither end is at fault. Where all nodes fail alone, the cause
    is common to them. Where at least three nodes pass alone and every pair fails, it is the fabric. A failure of all
    nodes together only, without any of the above, comes with scale.
    """
    alone = [trial for trial in trials if trial.step == "nodes"]
    bad = [trial for trial in alone if trial.failed]
    if len(alone) > 1 and len(bad) == len(alone):
        return [_finding("common", (), f"all {len(alone)} nodes fail alone", bad[0])]
    findings = [_finding("node", trial.nodes, "fails alone", trial) for trial in bad]
    findings += _pair_faults([trial for trial in trials if trial.step == "pairs"], {trial.nodes[0] for trial in bad})
    for trial in trials:
        if trial.step == "all" and trial.failed and not any(set(one.nodes) <= set(trial.nodes) for one in findings):
            findings.append(_finding("scale", trial.nodes, f"only all {len(trial.nodes)} nodes together fail", trial))
    return findings


def _pair_faults(pairs: Iterable[GroupRun], bad: set[str]) -> list[ClusterFinding]:
    judged = [trial for trial in pairs if not bad & set(trial.nodes)]
    failing = [trial for trial in judged if trial.failed]
    if len(judged) > 1 and len(failing) == len(judged):
        return [_finding("fabric", (), f"all {len(judged)} pairs fail", failing[0])]
    cut_off: dict[str, list[GroupRun]] = {}
    for node in dict.fromkeys(node for trial in failing for node in trial.nodes):
        own = [trial for trial in judged if node in trial.nodes]
        if len(own) > 1 and all(trial.failed for trial in own):
            cut_off[node] = own
    nodes = [
        _finding("node", (node,), f"fails with each of its {len(own)} partners", own[0])
        for node, own in cut_off.items()
    ]
    links = [trial for trial in failing if not cut_off.keys() & set(trial.nodes)]
    return nodes + [_finding("link", trial.nodes, "these two fail together", trial) for trial in links]


def _finding(kind: Kind, nodes: Group, evidence: str, trial: GroupRun) -> ClusterFinding:
    return ClusterFinding(kind=kind, nodes=nodes, evidence=f"{evidence}: {trial.verdict}: {trial.reason}".rstrip(": "))
