"""`distbench compare`: results against a baseline, and `--baseline` of the commands that run cases."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import msgspec

from distbench.cli.options import DEFAULT_OUT, add_json, add_report, add_voice, json_on_standard_output, report_writers
from distbench.errors import InvalidCase, Unsupported, worst_exit_code
from distbench.report.terminal import print_note, print_text, print_verdict
from distbench.utils.voice import Voice, voice

if TYPE_CHECKING:
    from distbench.report.results import Result, Results
    from distbench.tools.compare.comparison import Comparison, Detect

Baseline: TypeAlias = "list[list[Result]]"
_AUTO, _OFF = "auto", "off"
_FOLDER = f"{DEFAULT_OUT}/compare"
_REPORTS = "distbench.tools.compare.reports"  # loads numpy


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "compare",
        description="Compare results with older ones: verdicts first, then the time of each stage against the noise "
        "of both and, with several OLD, against the variation between launches. Exits with 1 on a regression or a "
        "missing value, 77 where something cannot be judged.",
    )
    command.add_argument(
        "old",
        metavar="OLD",
        nargs="+",
        help="a launch of the baseline: an --out folder, a results.jsonl, a report.json",
    )
    command.add_argument("new", metavar="NEW", help="the results to compare with it")
    add_json(command, "the comparison")
    add_report(command, ("html",), folder=_FOLDER)
    _add_judging(command)
    add_voice(command)
    command.set_defaults(command=_compare)


def add_baseline(command: Any) -> None:
    """Add the options that compare a command's results with older ones."""
    group = command.group("baseline", "comparison with older results")
    group.add_argument(
        "--baseline",
        metavar="DIR|FILE",
        action="append",
        default=[],
        help="compare with these results afterwards; once for each launch of the baseline",
    )
    _add_judging(group)


def read_baseline(options: argparse.Namespace) -> Baseline:
    """Results of each launch of the baseline.

    Read before a rank starts: an unreadable one is reported by then, and the run may overwrite one.
    """
    from distbench.report.results import Results

    _detect(options)
    return [list(Results(path)) for path in options.baseline]


def judge_baseline(
    options: argparse.Namespace,
    baseline: Baseline,
    results: Results,
    exit_code: int,
    keep: Callable[[str], bool] | None = None,
) -> int:
    """Compare `results` with the baseline, if there is one; return the worse of their exit code and `exit_code`.

    `keep` decides by name whether a case of the baseline was to be run at all.
    """
    if not baseline:
        return exit_code
    wanted = [[result for result in launch if keep is None or keep(result.name)] for launch in baseline]
    return worst_exit_code((exit_code, _judge(options, wanted, results)))


def _add_judging(command: Any) -> None:
    command.add_argument("--verdicts-only", action="store_true", help="compare no times")
    command.add_argument(
        "--detect",
        metavar="SHARE|off",
        default=_AUTO,
        help="slowdown that must be detectable in every arm and stage, such as 0.05, else exit 77 "
        "(default: 0.1 where a device was timed, else off)",
    )


def _detect(options: argparse.Namespace) -> Detect:
    """Value of --detect.

    Raises:
        InvalidCase: neither a share above 0 nor off.

    """
    if options.detect in (_AUTO, _OFF):
        return cast("Detect", options.detect)
    try:
        share = float(options.detect)
    except ValueError:
        share = math.nan
    if not 0 < share < math.inf:
        message = f"--detect {options.detect:.40}: give a share above 0, such as 0.05 for 5 %, or off"
        raise InvalidCase(message)
    return share


def _compare(options: argparse.Namespace) -> int:
    from distbench.report.export import write_reports
    from distbench.report.results import Results

    _detect(options)
    writers = report_writers(options, Path(_FOLDER), _REPORTS) if options.report else {}
    comparison = _judged(options, [Results(path) for path in options.old], Results(options.new))
    write_reports(comparison, writers)
    _print(comparison, options.json)
    for path in writers:
        print_note(f"page: {path}")
    return comparison.exit_code


def _judge(options: argparse.Namespace, old: Sequence[Iterable[Result]], new: Results) -> int:
    comparison = _judged(options, old, new)
    _print(comparison)
    _write_beside_page(options, comparison)
    return comparison.exit_code


def _write_beside_page(options: argparse.Namespace, comparison: Comparison) -> None:
    """Write the comparison's own page into the results' folder, where --report asks for HTML."""
    from distbench.report.export import load_writers, parse_targets, write_reports

    folder = Path(options.out)
    if "html" in parse_targets(",".join(options.report), folder):
        page = folder / "comparison.html"
        write_reports(comparison, load_writers({"html": page}, _REPORTS))
        print_note(f"page: {page}")


def _judged(options: argparse.Namespace, old: Sequence[Iterable[Result]], new: Results) -> Comparison:
    try:
        from distbench.tools.compare.comparison import compare
    except ModuleNotFoundError as error:
        message = f"compare: needs {error.name}, which is not installed; run: make setup"
        raise Unsupported(message) from error
    return compare(old, new, times=not options.verdicts_only, detect=_detect(options))


def _print(comparison: Comparison, json: str = "") -> None:
    from distbench.report.export import STANDARD_OUTPUT
    from distbench.report.files import write_atomically
    from distbench.tools.compare.text import comparison_lines

    if json and json != str(STANDARD_OUTPUT):
        write_atomically(Path(json), msgspec.json.format(msgspec.json.encode(comparison), indent=2) + b"\n")
    with json_on_standard_output(json, lambda: comparison):
        every, alone = voice() is Voice.VERBOSE, voice() is Voice.QUIET
        *lines, ending = comparison_lines(comparison, every=every, alone=alone)
        print_text(*lines)
        print_verdict(ending, comparison.exit_code)
