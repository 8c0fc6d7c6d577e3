"""Findings of a bundle's analysis. Loads no torch."""

from __future__ import annotations

import msgspec

from distbench.errors import Verdict
from distbench.verify.records import Diagnosis, Divergence, Judgement

INPUTS = "inputs"
SENT = "sent"
SUM = "sum"
"""Stages of an analysis besides those of a case: regenerated inputs against recorded ones; inputs that were overwritten
after they were made; and the sum that combine should have made of the recorded expert rows."""


class StageFinding(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of one arm on one rank: the number of recorded rows, and how many of them are wrong."""

    rank: int
    arm: str
    stage: str
    rows: int
    wrong: int
    first: Divergence | None = None


class Analysis(msgspec.Struct, frozen=True):
    """All findings, the missing parts, and the verdict and diagnosis drawn from them; None where nothing ran."""

    findings: list[StageFinding]
    missing: list[str]
    judgement: Judgement | None
    diagnosis: list[Diagnosis]

    @property
    def trusted(self) -> bool:
        """Whether the recorded inputs are exactly those generated here; of another version, whether they agree."""
        return not any(found.wrong for found in self.findings if found.stage == INPUTS)

    def confirms(self, verdict: Verdict, causes: list[str]) -> bool:
        """Whether the record is whole, its inputs are trusted, and it leads to this verdict and these causes."""
        if self.judgement is None or not self.trusted or self.missing:
            return False
        return self.judgement.verdict is verdict and [found.cause for found in self.diagnosis] == causes
