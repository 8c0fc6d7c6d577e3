"""The passes that one case compares (docs/semantics.md has the table of what each difference tells)."""

from __future__ import annotations

from functools import partial
from typing import Literal

from distbench.layer import Cut
from distbench.transport.base import Dispatched
from distbench.truncation import ExpertInput, Policy, guarded_limit, padded, repadded, truncated

Arm = Literal["padded", "control", "repadded", "truncated"]


def arms_of(limit: int | None, policy: Policy, *, refused: bool) -> dict[Arm, Cut]:
    """Return the arms of a case in the order in which they run; the first is the baseline.

    `limit` is None where the limit is off. `refused` says that policy strict found the limit below total_recv on some
    rank: then nothing is cut, on any rank.
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
