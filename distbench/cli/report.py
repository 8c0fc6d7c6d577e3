"""`distbench report`: export of existing results in another format."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distbench.cli.options import add_report, report_writers
from distbench.report.terminal import print_line, print_note
from distbench.utils.text import counted

if TYPE_CHECKING:
    from distbench.report.results import Results


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "report",
        description="Write results in other formats. Exits with the code of the results, as the suite did.",
    )
    command.add_argument(
        "results",
        metavar="DIR|FILE",
        help="the --out folder of a command that runs cases, its results.jsonl, a report.json, or a cluster.json",
    )
    add_report(command, required=True)
    command.add_argument(
        "--all",
        action="store_true",
        help="also count results that the last command in this folder did not select",
    )
    command.set_defaults(command=_report)


def _counted(options: argparse.Namespace) -> Results:
    """Results selected by the folder's last command, so that both exit alike; all of them with --all."""
    from distbench.report.results import Results

    results = Results(options.results)
    summary = results.summary
    if options.all or summary is None or not summary.selected:
        return results
    print_note(
        f"{options.results}: counts the {counted(len(summary.selected), 'case')} that the last command there selected; "
        "--all counts the others too"
    )
    return Results(options.results, frozenset(summary.selected).__contains__)


def _report(options: argparse.Namespace) -> int:
    from distbench.report import export
    from distbench.tools.cluster import reports
    from distbench.tools.cluster.validation import read_validation

    path = Path(options.results)
    plan = _plan(path)
    if plan is not None:
        found = read_validation(plan)
        _write(options, plan.parent, found, reports.__name__)
        return found.exit_code
    results = _counted(options)
    _write(options, results.path if results.path.is_dir() else results.path.parent, results, export.__name__)
    return results.exit_code


def _plan(path: Path) -> Path | None:
    """The document of a cluster's plan that `path` is, or has where it has no results of cases."""
    from distbench.report.journal import RESULTS
    from distbench.tools.cluster.validation import FILE

    if path.name == FILE:
        return path
    known = path / FILE
    return known if known.is_file() and not (path / RESULTS).exists() else None


def _write(options: argparse.Namespace, out: Path, content: object, package: str) -> None:
    from distbench.report.export import STANDARD_OUTPUT, write_reports

    writers = report_writers(options, out, package, silent=True)
    write_reports(content, writers)
    for path in writers:
        if path != STANDARD_OUTPUT:
            print_line(str(path))
