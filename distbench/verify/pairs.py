"""Pairs of outputs that are compared. Loads no torch."""

from __future__ import annotations

from distbench.case.stages import Arm
from distbench.verify.records import ORACLE


def pairs_of(arms: tuple[str, ...]) -> list[tuple[str, str]]:
    """Return the pairs of outputs to compare, in the order of the report. `arms` may end in the oracle."""
    wanted = [
        (Arm.PADDED, ORACLE),
        (Arm.PADDED, Arm.CONTROL),
        (Arm.PADDED, Arm.REPADDED),
        (Arm.REPADDED, Arm.TRUNCATED),
        (Arm.PADDED, Arm.TRUNCATED),
        (Arm.TRUNCATED, Arm.PRODUCTION),
        (Arm.PADDED, Arm.PRODUCTION),
        (Arm.PRODUCTION, ORACLE),
    ]
    return [pair for pair in wanted if pair[0] in arms and pair[1] in arms]


def pair_name(pair: tuple[str, str]) -> str:
    """Return the key of a comparison."""
    return f"{pair[0]}/{pair[1]}"
