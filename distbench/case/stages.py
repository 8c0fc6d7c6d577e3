"""Stages of a case on a rank, and the arms that pass through the layer. Both are text wherever they are written."""

from __future__ import annotations

from enum import Enum


class _Name(str, Enum):
    """A name that is its own text, in messages too."""

    def __str__(self) -> str:
        return str.__str__(self)

    def __format__(self, format_spec: str) -> str:
        return str.__format__(self, format_spec)


class Stage(_Name):
    """What a rank is doing, in the order of a case."""

    START = "start"
    AGREE = "agree"
    WORKLOAD = "workload"
    COMPILE = "compile"
    DISPATCH = "dispatch"
    TRUNCATE = "truncate"
    EXPERTS = "experts"
    CHECK = "check"
    COMBINE = "combine"
    TIMING = "timing"
    GATHER = "gather"
    REPORT = "report"
    DONE = "done"


class Arm(_Name):
    """Passes that are compared, in the order in which they run; the first is the baseline."""

    PADDED = "padded"
    CONTROL = "control"
    REPADDED = "repadded"
    TRUNCATED = "truncated"
    PRODUCTION = "production"
    """The pass of a caller's code; only where the case has a caller."""


STAGES: tuple[Stage, ...] = tuple(Stage)
ARMS: tuple[str, ...] = ("", *Arm)
"""Arms of a heartbeat: none between passes."""

OWN_ARMS = tuple(arm for arm in Arm if arm != Arm.PRODUCTION)
"""Arms of distbench's own code."""
FAULT_ARMS: tuple[str, ...] = ("", *OWN_ARMS)
"""Arms that an injected fault can be limited to; empty for all of them. A case with a caller takes no fault."""

LAYER_STAGES: tuple[Stage, ...] = (Stage.DISPATCH, Stage.TRUNCATE, Stage.EXPERTS, Stage.COMBINE)
"""Stages of a pass through the layer, which are timed and checked."""

CUT_ARMS = (Arm.REPADDED, Arm.TRUNCATED, Arm.PRODUCTION)
TIMED_ARMS = (Arm.PADDED, Arm.TRUNCATED)

SUB_BATCHES = ("A", "B")
"""Names of the sub-batches of two-batch overlap, in order."""
