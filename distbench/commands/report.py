"""`distbench report`: results that are there already, in another format."""

from __future__ import annotations

import argparse
from typing import Any

from distbench.commands.options import add_report, report_writers
from distbench.export import write_reports
from distbench.report.console import print_line
from distbench.report.results import Results


def add(commands: Any) -> None:
    """Describe the command."""
    command = commands.add_parser(
        "report",
        help="write results as JUnit, Markdown, CSV, Prometheus text or JSON",
        description="Write results in other formats. Exits with the code of the results, as the suite did.",
    )
    command.add_argument("results", metavar="DIR|FILE", help="the --out folder of a suite or run, or its results.jsonl")
    add_report(command, required=True)
    command.set_defaults(command=_report)


def _report(options: argparse.Namespace) -> int:
    results = Results(options.results)
    writers = report_writers(options, results.path if results.path.is_dir() else results.path.parent)
    write_reports(results, writers)
    for path in writers:
        print_line(str(path))
    return results.exit_code
