"""The arms that one case compares (docs/semantics.md tabulates what a difference between two arms means)."""

from __future__ import annotations

from functools import partial
from typing import Literal

from distbench.experts.base import Cut, ExpertInput
from distbench.transport.base import Dispatched
from distbench.truncation import Policy, guarded_limit, padded, repadded, truncated

Arm = Literal["padded", "control", "repadded", "truncated"]


def arms_of(limit: int | None, policy: Policy, *, refused: bool) -> dict[Arm, Cut]:
    """Arms of a case in execution order; the first is the baseline.

    `limit` is None where the limit is off. `refused`: policy strict found the limit below total_recv on some rank; then
    no arm is cut, on any rank.
    """
    arms: dict[Arm, Cut] = {"padded": padded, "control": padded}
    if limit is None or refused:
        return arms
    if policy == "guard":
        return arms | {
            "repadded": partial(_guarded, limit=limit, pad=True),
            "truncated": partial(_guarded, limit=limit, pad=False),
        }
    return arms | {"repadded": partial(repadded, limit=limit), "truncated": partial(truncated, limit=limit)}


def _guarded(dispatched: Dispatched, limit: int, *, pad: bool) -> ExpertInput:
    rows = guarded_limit(limit, dispatched)
    return repadded(dispatched, rows) if pad else truncated(dispatched, rows)
