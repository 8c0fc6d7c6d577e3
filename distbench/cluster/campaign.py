"""The steps of a plan in order, each without the nodes that an earlier step found at fault."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from distbench.cluster.devices import fail_other_devices
from distbench.cluster.faults import Finding, Trial, name_faults
from distbench.cluster.plan import Group, Round, Step, rounds_of
from distbench.cluster.stragglers import name_stragglers, not_judged
from distbench.errors import worst_exit_code

SCHEMA = "distbench.cluster/1"
SLOW_EXIT_CODE = 1

RunRound = Callable[[Step, Round], list[Trial]]


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """`distbench.cluster/1`: every trial, the findings, and the nodes that a scheduler should not use.

    `suite` names the suite of the groups. `emulated`: the nodes were groups of ranks on one machine. `not_run` has the
    steps for which too few nodes were left, `not_judged` the kinds of slowness that could not be judged, with reasons.
    """

    schema: str = SCHEMA
    suite: str = ""
    emulated: bool
    nodes: Group
    findings: list[Finding]
    defects: list[str]
    slow: list[str]
    not_run: list[Step]
    not_judged: list[str]
    exit_code: int
    trials: list[Trial]


def validate(
    nodes: Group, steps: Sequence[Step], run_round: RunRound, *, emulated: bool, suite: str = ""
) -> Validation:
    """Run `steps` of `suite` on `nodes` and judge them."""
    trials: list[Trial] = []
    not_run: list[Step] = []
    for step in steps:
        findings = name_faults(trials)
        left = _left(nodes, findings)
        rounds = [] if any(found.kind == "common" for found in findings) else rounds_of(step, left)
        trials += fail_other_devices([trial for groups in rounds for trial in run_round(step, groups)])
        if not rounds:
            not_run.append(step)
    faults, slow = name_faults(trials), name_stragglers(trials)
    codes = {trial.exit_code for trial in trials} | ({SLOW_EXIT_CODE} if slow else set())
    return Validation(
        suite=suite,
        emulated=emulated,
        nodes=nodes,
        findings=[*faults, *slow],
        defects=_nodes(faults, "node"),
        slow=_nodes(slow, "slow node"),
        not_run=not_run,
        not_judged=not_judged(trials),
        exit_code=worst_exit_code(codes),
        trials=trials,
    )


def document(validation: Validation) -> bytes:
    """`validation` as JSON."""
    return msgspec.json.format(msgspec.json.encode(validation), indent=2) + b"\n"


def _left(nodes: Group, findings: Sequence[Finding]) -> Group:
    bad = _nodes(findings, "node")
    return tuple(node for node in nodes if node not in bad)


def _nodes(findings: Sequence[Finding], kind: str) -> list[str]:
    return sorted({node for found in findings if found.kind == kind for node in found.nodes})
