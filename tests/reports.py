"""Synthetic reports in the form that a run writes."""

from __future__ import annotations

import msgspec

from distbench.case.expectations import BY_LIMIT
from distbench.case.identity import case_hash
from distbench.case.spec import Case
from distbench.errors import Verdict
from distbench.report.environment import Environment
from distbench.report.schema import LostReport, Report
from distbench.verify.records import Diagnosis
from distbench.workload.version import INPUTS_VERSION


def report_of(case: Case, cause: str, failing: Verdict = Verdict.CORRUPT, name: str = "made up") -> Report:
    """Report of a case that passed, or that failed with one cause."""
    verdict = failing if cause else Verdict.PASS
    diagnosis = [Diagnosis(cause=cause, confidence="certain", evidence="made up")] if cause else []
    return Report(
        inputs_version=INPUTS_VERSION,
        name=name,
        tags=(),
        verdict=verdict,
        exit_code=verdict.exit_code,
        expect=BY_LIMIT,
        as_expected=not cause,
        reasons=[],
        emulated=True,
        stand_ins=[],
        case=msgspec.to_builtins(case) | {"hash": case_hash(case)},
        sources={},
        warnings=[],
        limit=None,
        environment=Environment(hosts=[], devices=[], versions={}, commits={}, variables={}),
        transport={},
        ranks=[],
        comparison=[],
        gather=None,
        lost=LostReport(rows=0, tokens=[], by_rank={}),
        first_divergence=None,
        diagnosis=diagnosis,
        stacks={},
        injected=[],
        rate=None,
        timing={"wall_s": 0.25},
        memory={},
    )
