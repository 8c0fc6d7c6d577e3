"""`distbench trend`: results of many nights."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from distbench.cli.argument_types import whole
from distbench.cli.options import DEFAULT_OUT, add_report, add_voice, report_writers
from distbench.errors import Unsupported
from distbench.report.terminal import print_line, print_note, print_parts
from distbench.utils.voice import Voice, voice

_WRITERS = "distbench.tools.trend"
_DEFAULT_NIGHTS, _MOST_NIGHTS = 90, 1000


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
    add_report(command, ("html", "csv"), folder="--out")
    add_voice(command)


def _trend(options: argparse.Namespace) -> int:
    from distbench.report.export import STANDARD_OUTPUT, write_reports
    from distbench.report.progress import Meter

    try:
        from distbench.tools.trend.nights import find_nights
        from distbench.tools.trend.text import conclusion, parts_of
        from distbench.tools.trend.trend import trend_of
    except ModuleNotFoundError as error:
        message = f"trend: needs {error.name}, which is not installed; run: make setup"
        raise Unsupported(message) from error
    found = find_nights(options.folders, options.last)
    for folder in found.without:
        print_note(f"{folder}: no results in it; left out")
    if found.left_out:
        print_note(f"{found.left_out} older nights left out; --last NIGHTS takes more")
    writers = report_writers(options, Path(options.out), _WRITERS, silent=True)
    with Meter("trend: reading nights", len(found.nights)) as meter:

        def tell(number: int, name: str) -> None:
            meter.done, meter.now = number, name

        trend = trend_of(found.nights, tell)
        write_reports(trend, writers)
    if STANDARD_OUTPUT not in writers:
        every = voice() is Voice.VERBOSE
        print_parts([conclusion(trend)] if voice() is Voice.QUIET else parts_of(trend, every=every))
        for path in writers:
            print_line(str(path))
    return 0
