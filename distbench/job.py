"""What a launch hands to its ranks, and the files by which they are heard of when they cannot speak."""

from __future__ import annotations

from pathlib import Path

import msgspec

from distbench.breadcrumbs import Position
from distbench.case import Case


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """What every rank is told at its start. `supervised` says that a parent prints and decides the exit code."""

    case: Case
    sources: dict[str, str]
    warnings: list[str]
    out: str
    json_path: str
    supervised: bool
    started_ns: int


class RankFailure(msgspec.Struct, frozen=True, kw_only=True):
    """The exception that ended a launch, on the rank where it came first."""

    rank: int
    exception: str
    message: str
    position: Position
    traceback: str


def crumb_path(out: Path, rank: int) -> Path:
    """Return the file of a rank's breadcrumbs."""
    return out / "ranks" / f"rank-{rank:05d}.crumbs"


def failure_path(out: Path) -> Path:
    """Return the file that the first rank to fail leaves."""
    return out / "ranks" / "failure.json"


def describe_failure(failure: RankFailure) -> str:
    """Return one line: rank, arm, stage, exception."""
    place = f"{failure.position.arm}, {failure.position.stage}" if failure.position.arm else failure.position.stage
    return f"rank {failure.rank} raised {failure.exception} in {place}: {failure.message}"
