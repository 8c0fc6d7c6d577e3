"""Rules of conformance as reports of their cases say: held, broken, not stated, not run; and the exit code."""

from __future__ import annotations

import msgspec
import pytest

from distbench.case.suite import load_suite
from distbench.errors import Verdict
from distbench.report.schema import Report
from distbench.testing.conformance import RULES, SUITE, Held, exit_code, judge, with_merged
from distbench.verify.records import Reason
from tests.cases import tiny_case
from tests.reports import report_of


def report(rule: str, verdict: Verdict = Verdict.PASS) -> Report:
    made = report_of(tiny_case(), "" if verdict is Verdict.PASS else "x", verdict, rule)
    return msgspec.structs.replace(
        made, reasons=[Reason(code="x", message="first"), Reason(code="y", message="second")]
    )


def test_each_rule_is_judged_by_the_report_of_its_name() -> None:
    found = judge(
        [report("fp8", Verdict.UNSUPPORTED), report("cut", Verdict.CORRUPT), report("one-token"), report("another")]
    )
    assert [one.rule for one in found] == list(RULES)
    by_rule = {one.rule: one for one in found}
    assert by_rule["one-token"] == Held("one-token", "yes", RULES["one-token"])
    assert by_rule["cut"] == Held("cut", "NO", "CORRUPT: first")
    assert by_rule["fp8"] == Held("fp8", "not stated", "first")
    assert by_rule["capacity"] == Held("capacity", "not run", "")


@pytest.mark.parametrize(
    ("verdicts", "code"),
    [
        ([Verdict.PASS, Verdict.UNSUPPORTED], 0),
        ([Verdict.UNSUPPORTED] * len(RULES), 77),
        ([Verdict.PASS, Verdict.CORRUPT], 1),
        ([Verdict.CORRUPT, Verdict.HANG], 3),
    ],
)
def test_exit_code_is_that_of_the_worst_stated_rule(verdicts: list[Verdict], code: int) -> None:
    every = [*verdicts, *[Verdict.PASS] * (len(RULES) - len(verdicts))]
    assert exit_code(map(report, RULES, every)) == code


def test_rule_that_was_not_run_is_no_success() -> None:
    assert exit_code([report("fp8")]) == 3


def test_every_rule_has_a_report_where_one_rank_makes_cases_equal() -> None:
    suite = load_suite(SUITE, 1)
    assert suite.merged
    found = judge(with_merged([report(one.name) for one in suite.entries], suite.merged))
    assert [one.held for one in found] == ["yes"] * len(RULES)
