"""Rules of conformance as reports of their cases say: held, broken, not stated, not run; and the exit code."""

from __future__ import annotations

import msgspec
import pytest

from distbench.errors import Verdict
from distbench.report.schema import Report
from distbench.testing.conformance import RULES, Held, exit_code, judge
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
        ([Verdict.UNSUPPORTED], 77),
        ([Verdict.PASS, Verdict.CORRUPT], 1),
        ([Verdict.CORRUPT, Verdict.HANG], 3),
    ],
)
def test_exit_code_is_that_of_the_worst_stated_rule(verdicts: list[Verdict], code: int) -> None:
    assert exit_code(report("fp8", verdict) for verdict in verdicts) == code
