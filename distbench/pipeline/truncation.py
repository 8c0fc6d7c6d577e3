"""The cut in front of the experts: production's `[:L]`, and the padded alternatives that it is compared with."""

from __future__ import annotations

from functools import partial
from typing import Literal

from distbench.case.stages import Arm
from distbench.experts.base import Cut, ExpertInput
from distbench.transport.base import Dispatched, poison_

Policy = Literal["strict", "unchecked", "guard"]


def padded(dispatched: Dispatched) -> ExpertInput:
    """The whole receive buffer: the limit is off."""
    return ExpertInput(*dispatched)


def truncated(dispatched: Dispatched, limit: int) -> ExpertInput:
    """Hidden, scales, weights and ids cut to `[:limit]`; num_local_tokens is unchanged, as in production."""
    return ExpertInput(
        hidden=dispatched.hidden[:limit],
        scales=None if dispatched.scales is None else dispatched.scales[:limit],
        weights=dispatched.weights[:limit],
        ids=dispatched.ids[:limit],
        num_local_tokens=dispatched.total_recv,
    )


def repadded(dispatched: Dispatched, limit: int) -> ExpertInput:
    """Rows cut to `limit` and padded back to R with poison, in place: the padded kernel on the rows kept by a cut."""
    total = int(dispatched.total_recv)
    if limit < total:
        for buffer in dispatched.fields():
            poison_(buffer[limit:total])
    return ExpertInput(
        hidden=dispatched.hidden,
        scales=dispatched.scales,
        weights=dispatched.weights,
        ids=dispatched.ids,
        num_local_tokens=dispatched.total_recv.clamp(max=limit),
    )


def guarded_limit(limit: int, dispatched: Dispatched) -> int:
    """max(limit, total_recv), by a device-to-host read, which no graph capture allows."""
    return max(limit, int(dispatched.total_recv))


def arms_of(limit: int | None, policy: Policy, *, refused: bool) -> dict[Arm, Cut]:
    """Arms of a case in execution order; the first is the baseline.

    `limit` is None where the limit is off. `refused`: policy strict found the limit below total_recv on some rank; then
    no arm is cut, on any rank.
    """
    arms: dict[Arm, Cut] = {Arm.PADDED: padded, Arm.CONTROL: padded}
    if limit is None or refused:
        return arms
    if policy == "guard":
        return arms | {
            Arm.REPADDED: partial(_guarded, limit=limit, pad=True),
            Arm.TRUNCATED: partial(_guarded, limit=limit, pad=False),
        }
    return arms | {Arm.REPADDED: partial(repadded, limit=limit), Arm.TRUNCATED: partial(truncated, limit=limit)}


def _guarded(dispatched: Dispatched, limit: int, *, pad: bool) -> ExpertInput:
    rows = guarded_limit(limit, dispatched)
    return repadded(dispatched, rows) if pad else truncated(dispatched, rows)
