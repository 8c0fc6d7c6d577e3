"""A summary in Markdown: nodes at fault, slow nodes, gaps in the judgement, and the groups that failed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from distbench.report.export.markdown import escape, table
from distbench.tools.cluster.validation import Validation


def write(validation: Validation, file: BinaryIO) -> None:
    """Write the summary."""
    file.write("\n".join(_lines(validation)).encode() + b"\n")


def _lines(validation: Validation) -> Iterator[str]:
    failed = [trial for trial in validation.trials if trial.failed]
    passed = len(validation.trials) - len(failed)
    yield f"# distbench cluster: exit {validation.exit_code}, {passed} of {len(validation.trials)} groups pass"
    yield ""
    if validation.emulated:
        yield "**emulated**: all nodes are one machine"
    yield f"nodes: {escape(' '.join(validation.nodes))}"
    if validation.findings:
        found = ((one.kind, " ".join(one.nodes), one.evidence) for one in validation.findings)
        yield from table(("finding", "nodes", "evidence"), found)
    for step in validation.not_run:
        yield f"- not run: {step}"
    for gap in validation.not_judged:
        yield f"- not judged: {escape(gap)}"
    if failed:
        yield from table(
            ("step", "nodes", "verdict", "reason"),
            ((trial.step, " ".join(trial.nodes), trial.verdict, trial.reason) for trial in failed),
        )
