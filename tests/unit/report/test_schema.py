"""docs/report-format.md names every key of a report and of summary.json, docs/production.md every variable read."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from distbench.case.sglang_env import KEYS
from distbench.case.sglang_releases import VARIABLES
from distbench.report.environment import Environment
from distbench.report.findings import ErrorReport, FindingReport
from distbench.report.journal import Summary
from distbench.report.limit import LimitReport
from distbench.report.schema import InjectedReport, LostReport, RankReport, RateReport, Report

DOCS = Path(__file__).parents[3] / "docs"
_SECTIONS = (Report, Summary, RankReport, LimitReport, ErrorReport, FindingReport, LostReport, RateReport, Environment)


@pytest.mark.parametrize("section", [*_SECTIONS, InjectedReport], ids=lambda section: section.__name__)
def test_every_key_of_a_report_is_documented(section: Any) -> None:
    words = set(re.findall(r"\w+", (DOCS / "report-format.md").read_text(encoding="utf-8")))
    assert set(section.__struct_fields__) <= words


def test_every_variable_that_distbench_reads_is_documented() -> None:
    text = (DOCS / "production.md").read_text(encoding="utf-8")
    names = {f"SGLANG_MORI{short}" for short in re.findall(r"`(_\w+)`", text)} | set(re.findall(r"`(\w+)`", text))
    assert {*KEYS, *VARIABLES} <= names
