"""Legitimate reasons for bits that differ from padded's: order of additions, or another kernel; and the tolerance.

They apply only where inputs are not exact, and only where the arm is within its ideal on every rank; in reports without
errors, within the tolerance.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

import msgspec

from distbench.case.spec import Case
from distbench.case.stages import CUT_ARMS, LAYER_STAGES, Arm, Stage
from distbench.experts.selection.choice import KernelChoice
from distbench.utils.text import counted
from distbench.verify.records import Divergence, Gathered, Observation, Reason, ResolvedCase
from distbench.verify.tolerances import FP8_TOLERANCE, TOLERANCE

# Tolerance where expert rows are quantised on the trip back: up to half a step of e4m3 or E2M1 in each rank's row.
_QUANTISED_TOLERANCE = {"fp8_direct_cast": 2.0**-3, "fp8_blockwise": 2.0**-3, "fp4_blockwise": 2.0**-1}

ARM_ORDER = tuple(Arm)
OTHERS = ARM_ORDER[1:]
"""The arms other than padded."""
"""The arms that lose rows where the case asks for it."""

Excuse = Literal["", "order", "kernel"]
"""Reason why an arm's bits may differ from padded's: none, the order of additions, or another kernel."""


class Part(NamedTuple):
    """One kind of inputs: the resolved case with numerics exact or gaussian, and rank 0's records."""

    resolved: ResolvedCase
    gathered: Gathered

    @property
    def inputs(self) -> str:
        """The kind of inputs: exact or gaussian."""
        return self.resolved.case.numerics

    @property
    def exact(self) -> bool:
        """Whether every bit is known."""
        return self.inputs == "exact"

    @property
    def records(self) -> list[Observation]:
        """Records of all ranks."""
        return self.gathered.observations

    @property
    def kernels(self) -> dict[str, dict[str, Any]]:
        """Rank 0's kernel by arm."""
        return self.records[0].kernels

    @property
    def measured(self) -> bool:
        """Whether errors were measured: then they alone say what rounding explains, whatever is near or far."""
        return any(record.errors for record in self.records)

    def divergences(self, *arms: str) -> list[Divergence]:
        """Divergences of some arms that the case does not ask for, the earliest fault first."""
        found = [one for record in self.records for one in record.divergences if one.arm in arms]
        return in_order(one for one in found if not self.resolved.asks_for(one))

    def rows(self, arm: str) -> int:
        """Number of an arm's expert rows whose bits differ from padded's."""
        return sum(found.rows for found in self.divergences(arm) if not found.proven)

    def differing(self, pair: str) -> int:
        """Number of tokens that differ between two arms and lost no row to the limit; 0 without a comparison."""
        if pair not in self.gathered.comparisons:
            return 0
        if not self.resolved.lossy or not set(pair.split("/")).intersection(CUT_ARMS):
            found = self.gathered.comparisons[pair]
            return found.differing_tokens or int(not found.equal)
        return sum(record.survivors.differing.get(pair, 0) for record in self.records if record.survivors)

    def nan_tokens(self, record: Observation, arm: str) -> int:
        """Number of a rank's tokens that hold a NaN and lost no row to the limit."""
        if not self.resolved.lossy:
            return record.nan_tokens.get(arm, 0)
        return record.survivors.nan_tokens.get(arm, 0) if record.survivors else 0


def in_order(found: Iterable[Divergence]) -> list[Divergence]:
    """Divergences sorted by origin: arm, stage, rank."""
    return sorted(found, key=lambda one: (ARM_ORDER.index(one.arm), LAYER_STAGES.index(one.stage), one.rank))


def tolerance(case: Case) -> float:
    """Largest distance between two equally good results, as a share of the token's largest magnitude."""
    least = FP8_TOLERANCE if case.dispatch_dtype == "fp8" else TOLERANCE
    return max(_QUANTISED_TOLERANCE.get(case.combine_quant, TOLERANCE), least)


def is_close(error: float | None, allowed: float) -> bool:
    """Whether an error is within the tolerance; None, NaN and infinity are not."""
    return error is not None and error <= allowed


def far_ranks(part: Part, arm: str) -> list[Observation]:
    """Records of the ranks on which an arm is outside its ideal; without errors, beyond the tolerance or with a NaN.

    An old record, whose distance includes tokens with lost rows, is ignored where rows are lost.
    """
    if part.measured:
        return [record for record in part.records if any(one.arm == arm and not one.within for one in record.errors)]
    allowed = tolerance(part.resolved.case)
    told = [record for record in part.records if record.distance or not part.resolved.lossy]
    return [record for record in told if not is_close(record.distance_of(arm), allowed)]


def bounds_met(part: Part) -> str:
    """Name of the bounds that excused bits are within."""
    return "within its ideal" if part.measured else "within tolerance"


def adds_atomically(kernel: dict[str, Any]) -> bool:
    """Whether a kernel, by its record, adds in a different order each time, so that rounded sums vary."""
    return bool(kernel.get("stage2_mode") == "atomic")


def other_kernel(record: Observation, arm: str) -> bool:
    """Whether an arm's kernel differs from padded's on this rank."""
    padded, other = (msgspec.convert(record.kernels[name], KernelChoice) for name in (Arm.PADDED, arm))
    return not padded.same_kernel(other)


def never_repeats(part: Part) -> bool:
    """Whether the padded arm's kernel does not repeat its bits: it adds atomically, or control has shown it."""
    if part.exact:
        return False
    return adds_atomically(part.kernels[Arm.PADDED]) or _differs(part, Arm.CONTROL)


def excuse(part: Part, arm: str) -> Excuse:
    """Reason why the bits of `arm` may differ from padded's; none where the arm is outside its ideal on any rank."""
    return "" if far_ranks(part, arm) else _of_the_kernel(part, arm, part.records)


def is_noise(part: Part, found: Divergence) -> bool:
    """Whether a divergence is other bits of expert rows that the rank's kernel explains.

    Both sides must be within their ideal: the arm's rows, and the padded ones that they are compared with. Rows that
    arrived damaged are not measured; of an arm that has no others the tolerance decides.
    """
    record = next(record for record in part.records if record.rank == found.rank)
    if found.proven or _is_outside(part, record, found):
        return False
    return bool(_of_the_kernel(part, found.arm, [record]))


def _is_outside(part: Part, record: Observation, found: Divergence) -> bool:
    """Whether the two sides of a divergence of expert rows are further apart than the rounding of a kernel."""
    if not part.measured:
        return found.far > 0
    compared = {found.arm, Arm.PADDED}
    measured = [one for one in record.errors if one.stage == found.stage and one.arm in compared]
    outside = any(not one.within and (found.far or not one.nan_rows) for one in measured)  # a NaN counts if far
    damaged = {one.arm for one in record.divergences if one.stage == Stage.DISPATCH} - {one.arm for one in measured}
    return outside or bool(found.far and not compared.isdisjoint(damaged))


def any_outside(part: Part) -> bool:
    """Whether a measured error of any arm is outside its ideal on any rank: noise does not explain such a case."""
    return any(not error.within for record in part.records for error in record.errors)


def _of_the_kernel(part: Part, arm: str, records: Sequence[Observation]) -> Excuse:
    """Reason why an arm's kernel, on any of `records`, may give bits that differ from padded's."""
    if part.exact or arm not in part.kernels:
        return ""
    if any(other_kernel(record, arm) for record in records):
        return "kernel"
    return "order" if arm == Arm.CONTROL or never_repeats(part) else ""


def shows_other_bits(part: Part, arm: str) -> bool:
    """Whether an arm's bits differ from padded's, in expert rows or in tokens."""
    return arm in part.kernels and _differs(part, arm)


def _differs(part: Part, arm: str) -> bool:
    return bool(part.rows(arm) or part.differing(f"padded/{arm}"))


class Again(NamedTuple):
    """A kernel whose bits changed in a second run: timed, or in a graph's replay.

    `rounding`: the order of additions explains it. `other`: its kernel is not the padded arm's.
    """

    reason: Reason
    rounding: bool
    other: bool


def again(part: Part) -> list[Again]:
    """Second runs whose bits changed; wrong replays are divergences, and not included.

    A timed arm that loses rows to the limit is left out: each iteration loses different ones.
    """
    found = []
    for record in part.records:
        for arm, timed in record.timed.items():
            if not timed.last.equal and not (part.resolved.lossy and arm != Arm.PADDED):
                message = (
                    f"rank {record.rank}: the last timed iteration of {arm} differs from its checked pass in "
                    f"{counted(timed.last.differing_tokens, 'token')}"
                )
                near = part.measured or is_close(timed.drift, tolerance(part.resolved.case))
                near = near if timed.error is None else timed.error.within
                found.append(_once(part, record, arm, Reason(code="timed-differs", message=message), near=near))
        rows = sum(replay.near for replay in record.replays)
        if rows:
            message = f"rank {record.rank}: replays of the graph differ from eager experts in {counted(rows, 'row')}"
            arm = [*record.kernels][-1]
            found.append(_once(part, record, arm, Reason(code="replay-differs", message=message), near=True))
    return found


def _once(part: Part, record: Observation, arm: str, reason: Reason, *, near: bool) -> Again:
    """Exact inputs, and kernels that do not add atomically, must repeat their bits."""
    kernel = record.kernels[arm]
    rounding = near and not part.exact and adds_atomically(kernel)
    order = f", {bounds_met(part)}: its kernel ({kernel['label']}) adds in another order each time" if rounding else ""
    said = msgspec.structs.replace(reason, rank=record.rank, message=reason.message + order)
    return Again(said, rounding, other_kernel(record, arm))
