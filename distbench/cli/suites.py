"""`distbench suites`: the built-in suites."""

from __future__ import annotations

import argparse
from typing import Any

from distbench.case.suite import load_suite
from distbench.case.suite_file import builtin_suites
from distbench.report.terminal import print_table, print_text

_RANKS = 8


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "suites", description="List the built-in suites. `distbench init --suite` writes a file for one of your own."
    )
    command.set_defaults(command=_suites)


def _suites(_: argparse.Namespace) -> int:
    suites = [load_suite(name, _RANKS) for name in builtin_suites()]
    rows = [(suite.name, str(len(suite.entries)), suite.description) for suite in suites]
    print_table(rows, ("suite", f"cases on {_RANKS} ranks", "content"))
    print_text("distbench suite NAME runs one")
    return 0
