"""Meaning of a fact about a node for a way of running cases."""

from __future__ import annotations

from typing import Literal

import msgspec

Path = Literal["cpu", "cuda", "mori"]
Level = Literal["ok", "degraded", "missing"]
PATHS: tuple[Path, ...] = ("cpu", "cuda", "mori")

_EXIT_CODES = {"ok": 0, "degraded": 1, "missing": 2}


class Fact(msgspec.Struct, frozen=True, kw_only=True):
    """One line: the subject, the fact, and the fix where it is not ok."""

    topic: str
    level: Level
    found: str
    fix: str = ""
    paths: tuple[Path, ...] = PATHS
    """The ways of running that it affects."""


def exit_code(findings: list[Fact], path: Path) -> int:
    """0 for ready, 1 for degraded, 2 for not usable, for the needs of `path`."""
    return max((_EXIT_CODES[finding.level] for finding in findings if path in finding.paths), default=0)
