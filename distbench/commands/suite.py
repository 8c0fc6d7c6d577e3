"""`distbench suite`: many cases in one launch."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import msgspec

from distbench.case import case_hash
from distbench.commands.compare import add_baseline, check_baseline, judge_baseline
from distbench.commands.options import (
    add_case_options,
    add_launch,
    add_nodes,
    add_report,
    campaign,
    case_flags,
    check_launch,
    follow_node_0,
    is_rank_0,
    num_ranks,
    report_writers,
    warnings,
    work,
    world_size,
)
from distbench.export import write_reports
from distbench.job import Job
from distbench.locks import hold
from distbench.preflight import check_device_memory, check_folder, check_path
from distbench.production import read_environment
from distbench.progress import Progress
from distbench.report.console import print_summary
from distbench.report.journal import RESULTS, filter_journal
from distbench.report.results import Results
from distbench.suite import load_suite, select
from distbench.suite_files import builtin_suites

_DEFAULT_RANKS = 8


def add(commands: Any) -> None:
    """Describe the command."""
    suite = commands.add_parser(
        "suite",
        help="run many cases in one launch",
        description=f"Run the cases of a suite file, or of a built-in suite ({', '.join(builtin_suites())}). The same "
        "command with the same --out goes on where it was stopped.",
    )
    suite.set_defaults(command=_suite)
    suite.add_argument("suite", metavar="FILE|NAME", help="suite file, .toml or .json, or the name of a built-in one")
    add_launch(suite)
    add_nodes(suite)
    suite.add_argument(
        "--select", metavar="TERMS", default="", help="tags, key=value, name~text; ! negates, comma ands"
    )
    suite.add_argument("--rerun", choices=("failed", "all"), help="run again what had failed, or everything")
    suite.add_argument("--retries", type=int, default=0, metavar="N", help="tries more for a case that lost its ranks")
    suite.add_argument("--max-faults", type=int, default=3, metavar="K", help="stop after K such cases in a row")
    suite.add_argument("--quiet", action="store_true", help="no progress")
    add_report(suite)
    add_baseline(suite)
    add_case_options(suite)


def _suite(options: argparse.Namespace) -> int:
    followed = follow_node_0(options)
    if followed is not None:
        return followed
    ranks = num_ranks(options) or _DEFAULT_RANKS
    suite = load_suite(options.suite, ranks, case_flags(options), read_environment(os.environ))
    chosen = select(suite.entries, options.select)
    check_path(options.out)
    entries = tuple(msgspec.structs.replace(entry, warnings=warnings(entry.case, options)) for entry in chosen)
    check_folder(options.out, len(entries))
    out = Path(options.out)
    writers = report_writers(options, out)
    wanted = {case_hash(entry.case) for entry in entries}
    names = {entry.name for entry in entries}
    asked = names.__contains__ if options.select else None
    check_baseline(options)
    if world_size() is not None:
        code = work(Job(entries=entries, out=options.out, bundle=options.bundle, supervised=False))
        if is_rank_0():
            results = Results(out / RESULTS, wanted.__contains__)
            write_reports(results, writers)
            code = judge_baseline(options, results, code, asked)
        return code
    devices = check_launch([entry.case for entry in entries], options.nnodes)
    progress = Progress(len(entries), quiet=options.quiet)
    with hold(out, devices, options.lock_timeout):
        check_device_memory([entry.case for entry in entries], devices)
        if options.rerun == "all":
            (out / RESULTS).unlink(missing_ok=True)
        elif options.rerun == "failed":
            filter_journal(out, lambda line: line.as_expected)
        try:
            summary = campaign(entries, options, progress)
        finally:
            results = Results(out, wanted.__contains__)
            write_reports(results, writers)
    print_summary(summary, options.out)
    return judge_baseline(options, results, summary.exit_code, asked)
