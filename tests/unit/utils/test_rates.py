"""Failure rates with exact bounds, of a case and of a suite."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distbench.case.entry import Entry
from distbench.errors import Verdict
from distbench.launcher.campaign import Campaign, Rules
from distbench.report.console import print_report
from distbench.report.document import rate_report
from distbench.report.journal import Journal
from distbench.report.progress import Progress
from distbench.report.schema import InjectedReport, Report
from distbench.utils.stats import Rate, trials_to_see
from tests.cases import tiny_case
from tests.reports import report_of


@pytest.mark.parametrize(
    ("seen", "tried", "low", "high"),
    [(0, 3, 0.0, 0.7076), (3, 3, 0.2924, 1.0), (1, 10, 0.0025, 0.4450), (50, 100, 0.3983, 0.6017)],
)
def test_rate_bounds_equal_published_clopper_pearson_values(seen: int, tried: int, low: float, high: float) -> None:
    assert (Rate(seen, tried).low, Rate(seen, tried).high) == pytest.approx((low, high), abs=1e-4)


@settings(deadline=None)
@given(st.integers(1, 60), st.floats(0.01, 0.99))
def test_rate_interval_covers_the_true_rate_in_95_percent_of_trials(tried: int, rate: float) -> None:
    missed = math.fsum(
        math.comb(tried, seen) * rate**seen * (1 - rate) ** (tried - seen)
        for seen in range(tried + 1)
        if not Rate(seen, tried).low <= rate <= Rate(seen, tried).high
    )
    assert missed <= 0.05 + 1e-9


@given(st.floats(0.02, 0.99))
def test_trials_to_see_is_the_least_count_of_clean_trials_that_excludes_a_rate(rate: float) -> None:
    trials = trials_to_see(rate)
    assert Rate(0, trials).high <= rate + 1e-9
    assert trials == 1 or Rate(0, trials - 1).high > rate


def test_rate_bounds_are_exact_at_one_in_a_million() -> None:
    assert Rate(0, 10**9).high == pytest.approx(3.6889e-9, rel=1e-4)
    rate = Rate(3, 3_000_000)
    assert rate.low == pytest.approx(0.2062e-6, rel=1e-3)
    assert rate.high == pytest.approx(2.9224e-6, rel=1e-3)


def reported(seed: int, *, tokens: int, wrong: int, verdict: Verdict = Verdict.PASS, **values: Any) -> Report:
    made = report_of(tiny_case(seed=seed), "x" if verdict is not Verdict.PASS else "", verdict)
    return msgspec.structs.replace(
        made, name=f"case {seed}", rate=rate_report(wrong, tokens, 10), timing={"wall_s": 1.0}, **values
    )


def test_rate_of_a_suite_counts_all_cases_expected_to_pass(tmp_path: Path) -> None:
    reports = [
        reported(0, tokens=3_000_000, wrong=0),
        reported(1, tokens=1_000_000, wrong=2, verdict=Verdict.CORRUPT),
        reported(2, tokens=500, wrong=500, verdict=Verdict.UNDER_LIMIT, as_expected=True),
        reported(3, tokens=500, wrong=7, injected=[InjectedReport(name="zero-rows", options={}, hits={"1": 7})]),
    ]
    journal = Journal(tmp_path)
    for one in reports:
        journal.append(one)
    journal.close()
    entries = [
        Entry(name=f"case {seed}", case=tiny_case(seed=seed), sources={}, expect=verdict)
        for seed, verdict in enumerate(("PASS", "PASS", "UNDER_LIMIT", "PASS"))
    ]
    summary = Campaign(entries, tmp_path, Rules(), Progress(4, quiet=True)).conclude(None)
    assert summary.rate is not None
    assert (summary.rate.tokens, summary.rate.wrong_tokens, summary.rate.repeats) == (4_000_000, 2, 20)
    assert summary.rate.per_million == 0.5
    assert summary.rate.low_per_million < 0.5 < summary.rate.high_per_million < 2
    written = msgspec.json.decode((tmp_path / "summary.json").read_bytes())
    assert written["rate"]["high_per_million"] == summary.rate.high_per_million


def test_rate_without_wrong_tokens_has_an_upper_bound() -> None:
    rate = rate_report(0, 4_000_000, 1)
    assert rate is not None
    assert (rate.per_million, rate.low_per_million) == (0, 0)
    assert 0.9 < rate.high_per_million < 0.95
    assert rate_report(0, 0, 1) is None


def test_a_printed_rate_has_its_95_percent_interval_in_plain_digits(capsys: pytest.CaptureFixture[str]) -> None:
    print_report(msgspec.structs.replace(reported(1, tokens=512, wrong=4), timing={}))
    line = "wrong tokens: 4 of 512 in 10 repeats, 7,810 per million, 95 % CI 2,130 to 19,900"
    assert line in " ".join(capsys.readouterr().out.split())


def test_until_failure_without_repeats_defaults_to_10000_repeats() -> None:
    assert tiny_case(until_failure=True).repeats == 10_000
    assert tiny_case(until_failure=True, repeats=7).repeats == 7
    assert tiny_case().repeats == 1
