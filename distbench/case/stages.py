"""Names of arms and stages."""

from __future__ import annotations

STAGES = (
    "start",
    "agree",
    "workload",
    "compile",
    "dispatch",
    "truncate",
    "experts",
    "check",
    "combine",
    "timing",
    "gather",
    "report",
    "done",
)
ARMS = ("", "padded", "control", "repadded", "truncated")
