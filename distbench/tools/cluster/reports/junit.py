"""JUnit XML: one test case per group, and one that fails for each finding."""

from __future__ import annotations

from typing import BinaryIO

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

from distbench.errors import Verdict
from distbench.report.export.junit import xml_text
from distbench.tools.cluster.attribution import ClusterFinding, GroupRun
from distbench.tools.cluster.validation import Validation

# A wrong result is a failure; a group without a result is an error.
_WRONG_RESULT = Verdict.CORRUPT.exit_code


def write(validation: Validation, file: BinaryIO) -> None:
    """Write one suite; steps that were not run, and gaps in the judgement, are skipped."""
    suite = TestSuite(xml_text(_place(validation.suite)))
    for trial in validation.trials:
        suite.append(_group(validation.suite, trial))
    for finding in validation.findings:
        suite.append(_finding(validation.suite, finding))
    for step in validation.not_run:
        suite.append(
            _skipped(validation.suite, f"all of {step}", "not run: too few nodes are left, or all share a fault")
        )
    for gap in validation.not_judged:
        what, _, why = gap.partition(": ")
        suite.append(_skipped(validation.suite, what, f"not judged: {why}"))
    suite.add_property("emulated", "yes" if validation.emulated else "no")
    suite.add_property("nodes", xml_text(" ".join(validation.nodes)))
    suite.update_statistics()
    suite.time = round(suite.time, 3)
    document = JUnitXml("distbench.tools.cluster")
    document.add_testsuite(suite)
    document.write(file)


def _group(suite: str, trial: GroupRun) -> TestCase:
    case = _case(suite, "+".join(trial.nodes), trial.step, trial.wall_s)
    if trial.failed:
        kind = Failure if trial.exit_code == _WRONG_RESULT else Error
        case.result = [kind(xml_text(f"{trial.verdict}: {trial.reason}"), trial.verdict)]
    return case


def _finding(suite: str, finding: ClusterFinding) -> TestCase:
    name = " ".join((finding.kind, *finding.nodes))
    case = _case(suite, name, "findings", 0.0)
    case.result = [Failure(xml_text(finding.evidence), finding.kind)]
    return case


def _skipped(suite: str, name: str, why: str) -> TestCase:
    case = _case(suite, name, "findings", 0.0)
    case.result = [Skipped(xml_text(why))]
    return case


def _place(suite: str) -> str:
    """Name of a suite's plan, which separates the plans of two suites."""
    return ".".join(filter(None, ["distbench", "cluster", suite.replace(".", "_")]))


def _case(suite: str, name: str, place: str, wall_s: float) -> TestCase:
    case = TestCase(xml_text(name), xml_text(f"{_place(suite)}.{place}"))
    case.time = round(wall_s, 3)
    return case
