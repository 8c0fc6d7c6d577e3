"""`distbench suite`: many cases in one launch."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distbench.case.entry import Entry
from distbench.case.identity import case_hash
from distbench.cli.argument_types import duration, whole
from distbench.cli.compare import add_baseline, judge_baseline, read_baseline
from distbench.cli.multi_node import add_nodes, layout_of
from distbench.cli.options import (
    DEFAULT_OUT,
    add_case_options,
    add_launch,
    add_report,
    add_voice,
    case_flags,
    check_bundle,
    num_ranks,
    report_writers,
)
from distbench.cli.torchrun_rank import is_rank_0, world_size
from distbench.report.export import Writer
from distbench.report.progress import Progress
from distbench.report.terminal import print_note, print_step
from distbench.utils.text import counted

if TYPE_CHECKING:
    from distbench.case.suite import Suite
    from distbench.report.results import Results

Writers = dict[Path, Writer]

_DEFAULT_RANKS = 8
_SHOWN_DOUBLES = 8
# Names of results outside suites, in folders from before results named their suite.
_RUN, _TRIAL = "run", "trial "
_OWN_OUT = f"{DEFAULT_OUT}/NAME"


def add(commands: Any) -> None:
    """Add the command to the parser."""
    suite = commands.add_parser(
        "suite",
        description="Run the cases of a suite file, or of a built-in suite. The same command with the same --out "
        "resumes where it was stopped.",
    )
    suite.set_defaults(command=_suite, resumes="the same command resumes")
    suite.add_argument("suite", metavar="FILE|NAME", help="suite file, or one of `distbench suites`")
    add_launch(suite)
    suite.set_defaults(out=_OWN_OUT)
    add_nodes(suite)
    suite.add_argument(
        "--select", metavar="TERMS", default="", help="tags, key=value, name~text; ! negates, comma ands"
    )
    course = suite.group("course", "time, retries and early ends")
    course.add_argument("--rerun", choices=("failed", "all"), help="run failed cases again, or all that are selected")
    course.add_argument(
        "--retries", type=whole(0), default=0, metavar="TIMES", help="retries of a case that lost its ranks"
    )
    course.add_argument(
        "--max-faults", type=whole(1), default=3, metavar="CASES", help="stop after this number of such cases in a row"
    )
    course.add_argument(
        "--for",
        dest="time_budget",
        type=duration,
        metavar="TIME",
        help="begin no case that cannot end within 90s, 20m, 1h30m; none: no limit (default: the end of the Slurm job)",
    )
    add_report(suite)
    add_voice(suite)
    add_baseline(suite)
    add_case_options(suite)


def _suite(options: argparse.Namespace) -> int:
    from distbench.case.environment import reader
    from distbench.case.suite import load_suite, select
    from distbench.launcher.time_budget import earliest_deadline

    if options.out == _OWN_OUT:
        options.out = f"{DEFAULT_OUT}/{Path(options.suite).stem}"
    if layout_of(options) is not None:
        from distbench.cli.launching import follow_node_0

        followed = follow_node_0(options)
        if followed is not None:
            return followed
    options.deadline = earliest_deadline(options.time_budget, os.environ)
    ranks = num_ranks(options) or _DEFAULT_RANKS
    flags = case_flags(options)
    suite = load_suite(options.suite, ranks, flags, reader(os.environ))
    told = world_size() is None or is_rank_0()
    if suite.merged and told:
        print_note(_merged(suite))
    chosen = select(suite.entries, options.select)
    if told:
        print_step(
            f"suite {suite.name}: {counted(len(chosen), 'case')} on {counted(ranks, 'rank')}, results in {options.out}"
        )
    from distbench.cli.launching import examined
    from distbench.launcher.preflight import check_folder, check_path
    from distbench.launcher.resources import report_bytes

    check_path(options.out)
    entries = examined(chosen, suite.origin, options)
    check_folder(options.out)
    check_folder(options.out, report_bytes(entry.case for entry in _to_run(entries, options)))
    check_bundle(options)
    writers = report_writers(options, Path(options.out))
    act = _launch if world_size() is None else _take_part
    return act(entries, options, writers)


def _merged(suite: Suite) -> str:
    """Number of a suite's cases that equal others, with the first of them."""
    total = len(suite.entries) + len(suite.merged)
    shown = ", ".join(f"{name} equals {first}" for name, first in suite.merged[:_SHOWN_DOUBLES])
    more = f" and {len(suite.merged) - _SHOWN_DOUBLES} more" if len(suite.merged) > _SHOWN_DOUBLES else ""
    return f"{suite.origin}: {len(suite.merged)} of {counted(total, 'case')} equal others and run once: {shown}{more}"


def _launch(entries: tuple[Entry, ...], options: argparse.Namespace, writers: Writers) -> int:
    from distbench.cli.launching import exported, hold_bench
    from distbench.launcher.campaign import Rules
    from distbench.report.console import print_summary

    out, baseline = Path(options.out), read_baseline(options)
    progress = Progress(len(entries), what=f"suite {Path(options.suite).stem}")
    rules = Rules(retries=options.retries, max_faults=options.max_faults, deadline=options.deadline)
    with hold_bench(entries, options, lambda: _forget(out, entries, options.rerun)) as bench:
        results = _results(out, entries)
        with exported(results, writers):
            summary = bench.run(progress, rules)
        print_summary(summary, options.out)
        code = judge_baseline(options, baseline, results, summary.exit_code, _asked(entries, options))
        bench.nodes.exit_code = code
    return bench.nodes.exit_code


def _take_part(entries: tuple[Entry, ...], options: argparse.Namespace, writers: Writers) -> int:
    from distbench.cli.launching import take_part
    from distbench.launcher.job import Job

    job = Job(
        entries=entries,
        out=options.out,
        bundle=options.bundle,
        supervised=False,
        started=world_size() or 0,
        quiet=options.quiet,
        deadline=options.deadline,
    )
    out = Path(options.out)
    results, asked = _results(out, entries), _asked(entries, options)
    return take_part(job, options, lambda: _forget(out, entries, options.rerun), results, writers, asked)


def _forget(out: Path, entries: Sequence[Entry], rerun: str | None) -> None:
    """Drop the results that --rerun replaces; those of cases that were not selected stay.

    Raises:
        InvalidCase: the folder holds results of anything but this suite.

    """
    from distbench.report.journal import filter_journal, forget_cases, refuse_strangers, resume_journal

    refuse_strangers(out, entries[0].suite, lambda name: name != _RUN and not name.startswith(_TRIAL))
    chosen = {case_hash(entry.case) for entry in entries}
    if rerun == "all":
        forget_cases(out, chosen)
    elif rerun == "failed":
        resume_journal(out, entries)
        filter_journal(out, lambda line: line.as_expected or line.case.hash not in chosen)


def _to_run(entries: Sequence[Entry], options: argparse.Namespace) -> Sequence[Entry]:
    from distbench.report.journal import unfinished

    if options.rerun == "all":
        return entries
    return unfinished(Path(options.out), entries, lambda line: options.rerun is None or line.as_expected)


def _results(out: Path, entries: Sequence[Entry]) -> Results:
    from distbench.report.results import Results

    return Results(out, {case_hash(entry.case) for entry in entries}.__contains__)


def _asked(entries: Sequence[Entry], options: argparse.Namespace) -> Callable[[str], bool] | None:
    """Predicate by name for the selected cases of a baseline; None where all were selected."""
    return {entry.name for entry in entries}.__contains__ if options.select else None
