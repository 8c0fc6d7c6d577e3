"""The limit in a report: as asked for, as resolved, and for which traffic it loses no row."""

from __future__ import annotations

import msgspec

from distbench.limits import LimitProof
from distbench.verify.records import Question


class LimitReport(msgspec.Struct, frozen=True, kw_only=True):
    """The limit as asked for and as resolved; rows, or None for off.

    `safe` says that no rank receives more in this batch, `proof` whether that holds for any routing of its token
    counts; None in reports that were written before there was one.
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
        """The status of the proof; of an old report's limit no more is known than that it is safe for its batch."""
        if self.proof is not None:
            return self.proof.status
        return "this batch" if self.safe else "unsafe"

    def __str__(self) -> str:
        """Return the limit with where it came from, its policy, and what is proven of it."""
        if self.effective is None:
            return "limit off: no row is cut"
        proof = f"{self.status}: the fullest rank receives {self.max_recv}"
        if self.proof is not None:
            proof = self.proof.words(self.max_recv)
        return f"limit {self.requested} → {self.effective} rows (from {self.source}, policy {self.policy}), {proof}"


def limit_report(question: Question, sources: dict[str, str]) -> LimitReport:
    """Return the limit of a case; `sources` says where each of the case's values came from."""
    source = sources.get("limit", "default")
    if question.case.limit == "off":
        source = sources.get("recv_bound", source) if question.limit is not None else "off"
    return LimitReport(
        requested=question.case.limit,
        effective=question.limit,
        source=source,
        policy=question.case.policy,
        safe=not question.short_ranks,
        max_recv=question.traffic.max_recv,
        sum_tokens=sum(question.traffic.tokens),
        proof=question.proof,
    )
