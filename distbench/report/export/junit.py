"""JUnit XML: one test case per case, with its verdict and reasons where it did not end as expected."""

from __future__ import annotations

import re
from typing import BinaryIO

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from distbench.errors import Verdict
from distbench.report.export.totals import DISTBENCH, Totals
from distbench.report.results import Result, Results
from distbench.report.schema import parts_label
from distbench.utils.text import counted

# XML 1.0 cannot represent these, not even escaped.
_NOT_XML = re.compile(r"[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")
_SHORT_HASH = 12
# Verdicts without a result; all others are results that are wrong.
_ERRORS = (Verdict.HANG, Verdict.RANK_FAULT, Verdict.INVALID)


def write(results: Results, file: BinaryIO) -> None:
    """Write one suite: UNSUPPORTED is skipped, as expected is passed, and anything else fails or is an error.

    Cases without a result are an error too, all of them together in one test case.
    """
    totals = Totals(results)
    suite = TestSuite(xml_text(totals.suite))
    for result in results:
        suite.append(_test_case(result))
    if results.missing:
        suite.append(_missing(totals.suite, results.missing, results.summary.stopped if results.summary else ""))
    suite.add_property("emulated", xml_text(", ".join(sorted(totals.stand_ins))) or "no")
    suite.add_property("hosts", xml_text(" ".join(sorted(totals.hosts))))
    if totals.first_host:
        suite.hostname = xml_text(totals.first_host)
    if totals.ended:
        suite.timestamp = xml_text(min(totals.ended).removesuffix("Z"))
    suite.update_statistics()
    suite.time = round(suite.time, 3)
    document = JUnitXml(DISTBENCH)
    document.add_testsuite(suite)
    document.write(file)


def _test_case(result: Result) -> TestCase:
    case = TestCase(xml_text(_name(result)), xml_text(_class(result.suite, str(result.case.get("model", "case")))))
    case.time = round(result.wall_s, 3)
    kind: type[Skipped | Error | Failure] | None = None
    if result.verdict is Verdict.UNSUPPORTED:
        kind = Skipped
    elif not result.as_expected:
        kind = Error if result.verdict in _ERRORS else Failure
    if kind is not None:
        outcome = kind(xml_text(_headline(result)), result.verdict.value)
        outcome.text = xml_text("\n".join(_lines(result)))
        case.result = [outcome]
    case.system_out = xml_text("\n".join(_facts(result)))
    return case


def _name(result: Result) -> str:
    """Name of a test case; the case's hash is added for commands without a suite file, whose names recur."""
    digest = result.hash[:_SHORT_HASH]
    recurs = result.suite.startswith(f"{DISTBENCH} ") and digest not in result.name
    return f"{result.name} {digest}" if recurs else result.name


def _class(suite: str, model: str) -> str:
    """Class of a test case, which separates the cases of two suites; a dot ends a package's name."""
    return ".".join(filter(None, [DISTBENCH, suite.replace(".", "_"), model]))


def _headline(result: Result) -> str:
    first = f": {result.reasons[0].message}" if result.reasons else ""
    return f"{result.verdict.value}{first}"


def _lines(result: Result) -> list[str]:
    parts = parts_label(result.plugins, result.stand_ins)
    return [
        f"{result.verdict.value}{parts}, expected {result.expect}, case {result.hash}",
        *(f"{reason.code}: {reason.message}" for reason in result.reasons),
        *(f"diagnosis: {found.cause} ({found.confidence}): {found.evidence}" for found in result.diagnosis),
    ]


def _facts(result: Result) -> list[str]:
    """Facts that matter for any case, passed or not; the schema has no properties of a test case."""
    facts = [f"hosts: {' '.join(result.hosts)}"] if result.hosts else []
    facts += [f"ended: {result.ended}"] if result.ended else []
    return facts if result.limit is None else [*facts, str(result.limit), f"lost rows: {result.lost.rows}"]


def _missing(suite: str, count: int, why: str) -> TestCase:
    case = TestCase("cases without a result", xml_text(_class("" if suite == DISTBENCH else suite, "")))
    case.time = 0
    reason = f": {why}" if why else ""
    case.result = [Error(xml_text(f"{counted(count, 'case')} of the suite without a result{reason}"), "MISSING")]
    return case


def xml_text(text: str) -> str:
    """`text` with the characters escaped that XML cannot represent."""
    return _NOT_XML.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
