"""`distbench bisect`: which stage is to blame."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distbench.cli.argument_types import whole
from distbench.cli.launcher_tasks import tell_task
from distbench.cli.options import add_case_options, add_folder, add_ranks, add_voice, known_report, one_case
from distbench.cli.torchrun_rank import alone
from distbench.report.terminal import print_step, print_table, print_verdict
from distbench.utils.text import counted

if TYPE_CHECKING:
    from distbench.tools.bisect import Accusation, SwapResult
    from distbench.tools.lab import Lab


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "bisect",
        description="Run a failing case with one part at a time replaced by a trusted one. Exit code 0: one or more "
        "parts are named.",
    )
    command.set_defaults(command=_bisect)
    command.add_argument("case", metavar="CASE|REPORT", help="case file or report.json")
    add_ranks(command, "ranks, where the case does not say (default: 8)")
    add_folder(command)
    add_voice(command)
    command.add_argument(
        "--seeds",
        type=whole(1),
        metavar="SEEDS",
        help="most seeds to try for a failure (default: 64); required where a report says PASS",
    )
    add_case_options(command)


def _bisect(options: argparse.Namespace) -> int:
    from distbench.cli.launching import hold_lab
    from distbench.tools.bisect import bisect

    alone("bisect")
    tell_task()
    case = one_case(options.case, options)
    with hold_lab(options) as lab:
        known = known_report(options.case, options)
        accusation = bisect(lab, case, Path(options.out), known, options.seeds, _tell(lab))
    _print(accusation, table=not options.quiet)
    return 0 if accusation.blame.guilty else 1


def _tell(lab: Lab) -> Callable[[str], None]:
    """Printer of the steps on standard error."""

    def tell(what: str) -> None:
        lab.work = f"bisect: {what}"
        print_step(f"{lab.work} ({counted(lab.cases, 'case')}, {counted(lab.launches, 'launch')})")

    return tell


def _print(accusation: Accusation, *, table: bool) -> None:
    rows = [_row(result) for result in (accusation.base, *accusation.results)]
    if table:
        print_table(rows, ("replaced", "by", "failing", "ends in", "cured"))
    print_verdict(
        f"{accusation.verdict} ({counted(accusation.launches, 'launch')})", 0 if accusation.blame.guilty else 1
    )


def _row(result: SwapResult) -> tuple[str, ...]:
    parts = " + ".join(result.parts) or "nothing"
    cured = ("yes" if result.cured else "no") if result.parts else ""
    return parts, result.what, str(result.failing), "; ".join(result.endings), cured
