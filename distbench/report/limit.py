"""The limit in a report: as requested, as resolved, and the traffic for which it loses no row."""

from __future__ import annotations

import msgspec

from distbench.case.limits import LimitProof
from distbench.utils.text import counted
from distbench.verify.records import ResolvedCase


class LimitReport(msgspec.Struct, frozen=True, kw_only=True):
    """The limit as requested and as resolved, in rows, or None for off.

    `safe`: no rank receives more in this batch. `proof`: whether that holds for any routing of its token counts; None
    in reports from before it existed.
    """

    requested: str
    effective: int | None
    source: str
    policy: str
    safe: bool
    max_recv: int
    sum_tokens: int
    proof: LimitProof | None = None

    @property
    def status(self) -> str:
        """Status of the proof; an old report's limit is known to be safe for its batch at most."""
        if self.proof is not None:
            return self.proof.status
        return "this batch" if self.safe else "unsafe"

    def __str__(self) -> str:
        """The limit with its source, its policy, and the proof."""
        if self.effective is None:
            return "limit off: no row is cut"
        proof = f"{self.status}: the fullest rank receives {self.max_recv}"
        if self.proof is not None:
            proof = self.proof.words(self.max_recv)
        rows = counted(self.effective, "row")
        return f"limit {self.requested} → {rows} (from {self.source}, policy {self.policy}), {proof}"


def limit_report(resolved: ResolvedCase, sources: dict[str, str]) -> LimitReport:
    """Limit of a case; `sources` names the source of each of the case's values."""
    source = "off" if resolved.limit is None else sources.get(resolved.case.limit_key, "default")
    return LimitReport(
        requested=resolved.case.limit,
        effective=resolved.limit,
        source=source,
        policy=resolved.case.policy,
        safe=not resolved.short_ranks,
        max_recv=resolved.per_call.max_recv,
        sum_tokens=sum(resolved.traffic.tokens),
        proof=resolved.proof,
    )
