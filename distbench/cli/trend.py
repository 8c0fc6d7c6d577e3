"""`distbench trend`: results of many nights."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from distbench.cli.argument_types import whole
from distbench.cli.options import DEFAULT_OUT, add_report, report_writers
from distbench.errors import InvalidCase, Unsupported
from distbench.report.export import STANDARD_OUTPUT, write_reports
from distbench.report.terminal import print_line, print_note, print_parts

_WRITERS = "distbench.tools.trend"
_DEFAULT_NIGHTS, _MOST_NIGHTS = 90, 1000
_TELL_S = 2.0


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "trend",
        description="Follow results over many nights: verdicts that changed, pass rates, since when a case is bad, and "
        "times against the noise between nights. Exits with 0 whatever the results; those of a night have a code of "
        "their own, by `distbench report`.",
    )
    command.set_defaults(command=_trend)
    command.add_argument(
        "folders",
        metavar="FOLDER",
        nargs="+",
        help="the --out folder of a night, or a folder that holds such folders; nights are ordered by their time",
    )
    command.add_argument(
        "--last",
        type=whole(1, _MOST_NIGHTS),
        metavar="NIGHTS",
        default=_DEFAULT_NIGHTS,
        help="the newest nights alone (default: %(default)s)",
    )
    command.add_argument(
        "--out", metavar="DIR", default=f"{DEFAULT_OUT}/trend", help="folder for reports (default: %(default)s)"
    )
    add_report(command, ("html", "csv"))


class _Progress:
    """A line on standard error every few seconds while nights are read."""

    def __init__(self, nights: int) -> None:
        self._nights = nights
        self._told = time.monotonic()

    def __call__(self, number: int, name: str) -> None:
        now = time.monotonic()
        if now - self._told >= _TELL_S:
            self._told = now
            print_note(f"reading night {number + 1} of {self._nights}: {name}")


def _trend(options: argparse.Namespace) -> int:
    try:
        from distbench.tools.trend.nights import find_nights
        from distbench.tools.trend.text import parts_of
        from distbench.tools.trend.trend import trend_of
    except ModuleNotFoundError as error:
        message = f"trend: needs {error.name}, which is not installed; run: make setup"
        raise Unsupported(message) from error
    found = find_nights(options.folders, options.last)
    for folder in found.without:
        print_note(f"{folder}: no results in it; left out")
    if found.left_out:
        print_note(f"{found.left_out} older nights left out; --last NIGHTS takes more")
    if not found.nights:
        message = "trend: no results; give the --out folders of suites"
        raise InvalidCase(message)
    writers = report_writers(options, Path(options.out), _WRITERS, silent=True)
    trend = trend_of(found.nights, _Progress(len(found.nights)))
    write_reports(trend, writers)
    if STANDARD_OUTPUT not in writers:
        print_parts(parts_of(trend))
        for path in writers:
            print_line(str(path))
    return 0
