"""What the analysis of a bundle finds. Loads no torch."""

from __future__ import annotations

import msgspec

from distbench.errors import Verdict
from distbench.verify.records import Diagnosis, Divergence, Judgement

INPUTS = "inputs"
SUM = "sum"
"""Stages of an analysis beside those of a case: inputs made anew against those recorded, and the sum that combine
should have made of the expert rows that were recorded."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One stage of one arm on one rank: recorded rows looked at, and how many of them are wrong."""

    rank: int
    arm: str
    stage: str
    rows: int
    wrong: int
    first: Divergence | None = None


class Analysis(msgspec.Struct, frozen=True):
    """All findings, the parts that are not here, and verdict and diagnosis drawn from them; None where nothing ran."""

    findings: list[Finding]
    missing: list[str]
    judgement: Judgement | None
    diagnosis: list[Diagnosis]

    @property
    def trusted(self) -> bool:
        """Whether this machine makes the very inputs that were recorded."""
        return not any(found.wrong for found in self.findings if found.stage == INPUTS)

    def confirms(self, verdict: Verdict, causes: list[str]) -> bool:
        """Whether what was recorded leads to this verdict and to these causes, on inputs that are made alike here."""
        if self.judgement is None or not self.trusted or self.missing:
            return False
        return self.judgement.verdict is verdict and [found.cause for found in self.diagnosis] == causes
