"""`distbench compare`: results against a baseline, and `--baseline` of the commands that run cases."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from distbench.errors import Unsupported, worst_exit_code
from distbench.report.console import print_line
from distbench.report.files import write_atomically
from distbench.report.results import Results


def add(commands: Any) -> None:
    """Describe the command."""
    command = commands.add_parser(
        "compare",
        help="what became wrong or slower since a baseline",
        description="Compare results with older ones: verdicts first, then the time of each stage against the noise "
        "that both have. Exits with 1 on a regression or a value that is gone, 77 where a stage cannot be judged.",
    )
    command.add_argument("old", metavar="OLD", help="the baseline: an --out folder, a results.jsonl or a report.json")
    command.add_argument("new", metavar="NEW", help="what is compared with it")
    command.add_argument("--json", metavar="PATH", default="", help="write the comparison here too")
    _add_verdicts_only(command)
    command.set_defaults(command=_compare)


def add_baseline(command: Any) -> None:
    """Add the options that compare what was run with older results."""
    command.add_argument("--baseline", metavar="DIR|FILE", default="", help="compare with these results afterwards")
    _add_verdicts_only(command)


def check_baseline(options: argparse.Namespace) -> None:
    """Read the baseline, so that one that cannot be read is known before a rank starts."""
    if options.baseline:
        sum(1 for _ in Results(options.baseline))


def judge_baseline(
    options: argparse.Namespace, results: Results, exit_code: int, keep: Callable[[str], bool] | None = None
) -> int:
    """Compare `results` with the baseline, if there is one; return the worse exit code of theirs and `exit_code`.

    `keep` tells by its name whether a case of the baseline was to be run at all.
    """
    if not options.baseline:
        return exit_code
    return worst_exit_code((exit_code, _judge(options, Results(options.baseline), results, "", keep)))


def _add_verdicts_only(command: Any) -> None:
    command.add_argument("--verdicts-only", action="store_true", help="compare no times")


def _compare(options: argparse.Namespace) -> int:
    return _judge(options, Results(options.old), Results(options.new), options.json)


def _judge(
    options: argparse.Namespace, old: Results, new: Results, path: str, keep: Callable[[str], bool] | None = None
) -> int:
    try:
        from distbench.compare.comparison import compare  # noqa: PLC0415 - loads numpy
        from distbench.compare.words import comparison_lines  # noqa: PLC0415 - likewise
    except ModuleNotFoundError as error:
        message = f"compare: needs {error.name}, which is not installed; run: make setup"
        raise Unsupported(message) from error
    wanted = (result for result in old if keep is None or keep(result.name))
    comparison = compare(wanted, new, times=not options.verdicts_only)
    if path:
        write_atomically(Path(path), msgspec.json.format(msgspec.json.encode(comparison), indent=2) + b"\n")
    for line in comparison_lines(comparison):
        print_line(line)
    return comparison.exit_code
