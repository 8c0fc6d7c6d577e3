"""`distbench collect`: verdicts of a torchrun job that has ended."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distbench.cli.options import add_lock_timeout


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser("collect", description="Verdicts from the folder of a torchrun job that has ended.")
    command.add_argument("folder", metavar="DIR", help="the job's --out")
    add_lock_timeout(command)
    command.set_defaults(command=_collect)


def _collect(options: argparse.Namespace) -> int:
    from distbench.launcher.collect import collect
    from distbench.report.console import print_summary

    summary = collect(Path(options.folder), options.lock_timeout)
    print_summary(summary, options.folder)
    return summary.exit_code
