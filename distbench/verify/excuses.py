"""What may explain other bits than the padded arm's: the order of additions, or another kernel; and how near is near.

Only where inputs are not exact, and only within the tolerance on every rank.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from distbench.breadcrumbs import ARMS
from distbench.case import Case
from distbench.experts.selection import KernelChoice
from distbench.verify.records import STAGE_ORDER, Divergence, Gathered, Observation, Question, Reason
from distbench.verify.tolerances import FP8_TOLERANCE, TOLERANCE

# The tolerance where expert rows are quantised on their way back: up to half a step of e4m3 or E2M1 in each rank's row.
_QUANTISED_TOLERANCE = {"fp8_direct_cast": 2.0**-3, "fp8_blockwise": 2.0**-3, "fp4_blockwise": 2.0**-1}

ARM_ORDER = ARMS[1:]
OTHERS = ARM_ORDER[1:]
"""The arms beside padded."""
CUT_ARMS = ("repadded", "truncated")
"""The arms that lose rows where the case asks for it."""

Excuse = Literal["", "order", "kernel"]
"""Why an arm may have other bits than padded: nothing, the order of additions, or another kernel."""


class Part(NamedTuple):
    """One kind of inputs: what is asked of a case with it, numerics exact or gaussian, and what rank 0 holds."""

    question: Question
    gathered: Gathered

    @property
    def inputs(self) -> str:
        """The kind of inputs: exact or gaussian."""
        return self.question.case.numerics

    @property
    def exact(self) -> bool:
        """Whether every bit is known."""
        return self.inputs == "exact"

    @property
    def records(self) -> list[Observation]:
        """What the ranks saw."""
        return self.gathered.observations

    @property
    def kernels(self) -> dict[str, dict[str, Any]]:
        """Rank 0's kernel by arm."""
        return self.records[0].kernels

    def divergences(self, *arms: str) -> list[Divergence]:
        """Divergences of some arms that the case does not ask for, the one that went wrong first in front."""
        found = [one for record in self.records for one in record.divergences if one.arm in arms]
        return in_order(one for one in found if not self.question.asks_for(one))

    def rows(self, arm: str) -> int:
        """Expert rows of an arm with other bits than padded has."""
        return sum(found.rows for found in self.divergences(arm) if not found.proven)

    def differing(self, pair: str) -> int:
        """Tokens that differ between two arms and lost no row to the limit; 0 where the arms were not compared."""
        if pair not in self.gathered.comparisons:
            return 0
        if not self.question.lossy or not set(pair.split("/")).intersection(CUT_ARMS):
            found = self.gathered.comparisons[pair]
            return found.differing_tokens or int(not found.equal)
        return sum(record.survivors.differing.get(pair, 0) for record in self.records if record.survivors)

    def nan_tokens(self, record: Observation, arm: str) -> int:
        """Tokens of a rank that hold a NaN and lost no row to the limit."""
        if not self.question.lossy:
            return record.nan_tokens.get(arm, 0)
        return record.survivors.nan_tokens.get(arm, 0) if record.survivors else 0


def in_order(found: Iterable[Divergence]) -> list[Divergence]:
    """Divergences by what went wrong first: arm, stage, rank."""
    return sorted(found, key=lambda one: (ARM_ORDER.index(one.arm), STAGE_ORDER.index(one.stage), one.rank))


def tolerance(case: Case) -> float:
    """How far a result may be from another that is as good, as a share of the token's largest magnitude."""
    least = FP8_TOLERANCE if case.dispatch_dtype == "fp8" else TOLERANCE
    return max(_QUANTISED_TOLERANCE.get(case.combine_quant, TOLERANCE), least)


def is_close(error: float | None, allowed: float) -> bool:
    """Whether an error is within the tolerance; None, a NaN or an infinity, is not."""
    return error is not None and error <= allowed


def far_ranks(part: Part, arm: str) -> list[Observation]:
    """Records of the ranks on which an arm is further from padded than the tolerance, or holds a NaN.

    A record that was made before tokens with lost rows were left out tells nothing where rows are lost.
    """
    allowed = tolerance(part.question.case)
    told = [record for record in part.records if record.distance or not part.question.lossy]
    return [record for record in told if not is_close(record.distance_of(arm), allowed)]


def adds_atomically(kernel: dict[str, Any]) -> bool:
    """Whether a kernel, as a record names it, adds in another order each time: other bits where sums are rounded."""
    return bool(kernel.get("stage2_mode") == "atomic")


def other_kernel(record: Observation, arm: str) -> bool:
    """Whether an arm ran another kernel than padded on this rank."""
    padded, other = (msgspec.convert(record.kernels[name], KernelChoice) for name in ("padded", arm))
    return not padded.same_kernel(other)


def never_repeats(part: Part) -> bool:
    """Whether the padded arm's kernel gives other bits each time: it adds atomically, or control has shown it."""
    if part.exact:
        return False
    return adds_atomically(part.kernels["padded"]) or _differs(part, "control")


def excuse(part: Part, arm: str) -> Excuse:
    """Why the tokens of `arm` may have other bits than padded's; nothing where they are far from them on any rank."""
    return "" if far_ranks(part, arm) else _of_the_kernel(part, arm, part.records)


def is_noise(part: Part, found: Divergence) -> bool:
    """Whether a divergence is other bits of expert rows, all of them near, that their rank's kernel explains."""
    if found.proven or found.far:
        return False
    record = next(record for record in part.records if record.rank == found.rank)
    return bool(_of_the_kernel(part, found.arm, [record]))


def _of_the_kernel(part: Part, arm: str, records: Sequence[Observation]) -> Excuse:
    """Why an arm's kernel, on any of `records`, may give other bits than padded's."""
    if part.exact or arm not in part.kernels:
        return ""
    if any(other_kernel(record, arm) for record in records):
        return "kernel"
    return "order" if arm == "control" or never_repeats(part) else ""


def shows_other_bits(part: Part, arm: str) -> bool:
    """Whether an arm has other bits than padded, in expert rows or in tokens."""
    return arm in part.kernels and _differs(part, arm)


def _differs(part: Part, arm: str) -> bool:
    return bool(part.rows(arm) or part.differing(f"padded/{arm}"))


class Again(NamedTuple):
    """A kernel that gave other bits when it ran again: timed, or in a graph's replay.

    `rounding`: the order of additions explains it. `other`: it is another kernel than the padded arm's.
    """

    reason: Reason
    rounding: bool
    other: bool


def again(part: Part) -> list[Again]:
    """What ran again and gave other bits; replays that are wrong are divergences, and not among them.

    A timed arm that loses rows to the limit is left out: it loses others in each iteration.
    """
    found = []
    for record in part.records:
        for arm, timed in record.timed.items():
            if not timed.last.equal and not (part.question.lossy and arm != "padded"):
                message = (
                    f"rank {record.rank}: the last timed iteration of {arm} differs from its checked pass in "
                    f"{timed.last.differing_tokens} tokens"
                )
                allowed = tolerance(part.question.case) if timed.apart is None else timed.apart
                near = is_close(timed.drift, allowed) and (timed.error is None or timed.error.within)
                found.append(_once(part, record, arm, Reason(code="timed-differs", message=message), near=near))
        rows = sum(replay.near for replay in record.replays)
        if rows:
            message = f"rank {record.rank}: replays of the graph differ from eager experts in {rows} rows"
            arm = [*record.kernels][-1]
            found.append(_once(part, record, arm, Reason(code="replay-differs", message=message), near=True))
    return found


def _once(part: Part, record: Observation, arm: str, reason: Reason, *, near: bool) -> Again:
    """Exact inputs, and kernels that do not add atomically, have to repeat their bits."""
    kernel = record.kernels[arm]
    rounding = near and not part.exact and adds_atomically(kernel)
    order = f", within tolerance: its kernel ({kernel['label']}) adds in another order each time" if rounding else ""
    said = msgspec.structs.replace(reason, rank=record.rank, message=reason.message + order)
    return Again(said, rounding, other_kernel(record, arm))
