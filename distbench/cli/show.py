"""`distbench show`: a report as text."""

from __future__ import annotations

import argparse
from typing import Any

from distbench.report.console import print_report
from distbench.report.files import read_report


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("show", description="Print a report again.")
    command.add_argument("report", metavar="REPORT", help="a report.json")
    command.add_argument("-v", "--verbose", action="store_true", help="a row for every rank")
    command.add_argument("--quiet", action="store_true", help="the verdict alone")
    command.set_defaults(command=_show)


def _show(options: argparse.Namespace) -> int:
    print_report(read_report(options.report), verbose=options.verbose, quiet=options.quiet)
    return 0
