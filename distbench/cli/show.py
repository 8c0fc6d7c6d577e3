"""`distbench show`: a report as text."""

from __future__ import annotations

import argparse
from typing import Any

from distbench.cli.options import add_voice


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("show", description="Print a report again.")
    command.add_argument("report", metavar="REPORT", help="a report.json")
    add_voice(command)
    command.set_defaults(command=_show)


def _show(options: argparse.Namespace) -> int:
    from distbench.report.console import print_report
    from distbench.report.files import read_report

    print_report(read_report(options.report))
    return 0
