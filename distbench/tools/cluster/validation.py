"""The steps of a plan in order, each without the nodes that an earlier step found at fault."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from distbench.errors import InvalidCase, Verdict, worst_exit_code
from distbench.tools.cluster.attribution import ClusterFinding, GroupRun, name_faults
from distbench.tools.cluster.plan import Group, Round, Step, rounds_of
from distbench.tools.cluster.stragglers import name_stragglers, not_judged
from distbench.utils.text import one_line

SCHEMA = "distbench.cluster/1"
FILE = "cluster.json"
"""Name of the document in the folder of a plan."""
SLOW_EXIT_CODE = 1
_MOST_US = 1e15

RunRound = Callable[[Step, Round], list[GroupRun]]


class Validation(msgspec.Struct, frozen=True, kw_only=True):
    """`distbench.cluster/1`: every trial, the findings, and the nodes that a scheduler should not use.

    `suite` names the suite of the groups. `emulated`: the nodes were groups of ranks on one machine. `not_run` has the
    steps for which too few nodes were left, `not_judged` the kinds of slowness that could not be judged, with reasons.
    """

    schema: str = SCHEMA
    suite: str = ""
    emulated: bool
    nodes: Group
    findings: list[ClusterFinding]
    defects: list[str]
    slow: list[str]
    not_run: list[Step]
    not_judged: list[str]
    exit_code: int
    trials: list[GroupRun]


def validate(
    nodes: Group, steps: Sequence[Step], run_round: RunRound, *, emulated: bool, suite: str = ""
) -> Validation:
    """Run `steps` of `suite` on `nodes` and judge them."""
    trials: list[GroupRun] = []
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


def read_validation(path: Path) -> Validation:
    """The validation in a cluster.json.

    Raises:
        InvalidCase: the file cannot be read, or is none.

    """
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Validation)
    except (OSError, ValueError, RecursionError) as error:
        message = f"{path}: {one_line(error)}; give the --out folder of distbench cluster"
        raise InvalidCase(message) from error
    if found.schema != SCHEMA:
        message = f"{path}: schema {found.schema!r:.40}, known is {SCHEMA}"
        raise InvalidCase(message)
    times = (one for trial in found.trials for stage in trial.times.values() for one in stage.values())
    wrong = next((one for one in times if not 0 < one < _MOST_US), None)
    if wrong is not None:
        message = f"{path}: a time of {wrong:g} µs; give the --out folder of distbench cluster"
        raise InvalidCase(message)
    return found


def _left(nodes: Group, findings: Sequence[ClusterFinding]) -> Group:
    bad = _nodes(findings, "node")
    return tuple(node for node in nodes if node not in bad)


def _nodes(findings: Sequence[ClusterFinding], kind: str) -> list[str]:
    return sorted({node for found in findings if found.kind == kind for node in found.nodes})


_CPU = ("cpu",)


def fail_other_devices(trials: Sequence[GroupRun]) -> list[GroupRun]:
    """Trials of one step, marked as failed where they ran on other devices than most; in a tie the CPU loses.

    Trials without a result have no devices and are not counted.
    """
    counts = Counter(trial.devices for trial in trials if trial.devices)
    usual = max(counts, key=lambda devices: (counts[devices], devices != _CPU, devices), default=())
    return [
        _failed(trial, f"{counts[usual]} of {counts.total()} on {' and '.join(usual)}")
        if trial.devices not in ((), usual) and not trial.failed
        else trial
        for trial in trials
    ]


def _failed(trial: GroupRun, others: str) -> GroupRun:
    lacking = Verdict.UNSUPPORTED
    reason = f"ran on {' and '.join(trial.devices)}, {others}"
    return msgspec.structs.replace(trial, exit_code=lacking.exit_code, verdict=lacking.value, reason=reason, times={})
