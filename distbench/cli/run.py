"""`distbench run`: one case, padded against truncated."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distbench.case.entry import Entry
from distbench.case.spec import Case
from distbench.cli.compare import add_baseline, judge_baseline, read_baseline
from distbench.cli.multi_node import add_nodes
from distbench.cli.options import (
    add_case_options,
    add_json,
    add_launch,
    add_report,
    add_voice,
    case_flags,
    check_bundle,
    json_on_standard_output,
    num_ranks,
    report_writers,
)
from distbench.cli.torchrun_rank import is_rank_0, world_size
from distbench.errors import InvalidCase, Verdict, worst_exit_code
from distbench.report.progress import Progress
from distbench.report.terminal import print_text

if TYPE_CHECKING:
    from distbench.report.export import Writer

_SUITE, _NAME = "distbench run", "run"
_REPORT = "report.json"


def add(commands: Any) -> None:
    """Add the command to the parser."""
    run = commands.add_parser(
        "run",
        description="Run one case. Flags win over the case file, the file over production's variables, these over "
        "a profile and defaults. Under torchrun this process is a rank; otherwise it starts the ranks.",
    )
    run.set_defaults(command=_run)
    add_launch(run)
    add_nodes(run)
    run.add_argument("--case", metavar="FILE", help="case file, .toml or .json")
    add_json(run, "the report")
    add_report(run)
    add_voice(run)
    add_baseline(run)
    add_case_options(run)


def _run(options: argparse.Namespace) -> int:
    from distbench.case.environment import read_environment
    from distbench.case.resolve import load_case_file, resolve_case
    from distbench.cli.launching import follow_node_0, warnings
    from distbench.launcher.preflight import check_folder, check_path
    from distbench.launcher.resources import report_bytes
    from distbench.report.export import STANDARD_OUTPUT
    from distbench.report.files import read_report

    followed = follow_node_0(options)
    if followed is not None:
        return followed
    layers = [*case_flags(options), *([load_case_file(options.case)] if options.case else [])]
    resolved = resolve_case([*layers, *read_environment(os.environ, layers)], num_ranks(options))
    entry = Entry(
        name=_NAME,
        suite=_SUITE,
        case=resolved.case,
        sources=resolved.sources,
        expect=Verdict.PASS.value,
        warnings=(*resolved.notes, *warnings(resolved.case, resolved.sources, options)),
    )
    also = [options.json] if options.json not in ("", str(STANDARD_OUTPUT)) else []
    paths = (str(Path(options.out) / _REPORT), *also)
    for path in paths:
        check_path(path)
        check_folder(str(Path(path).parent), report_bytes([resolved.case]))
    check_bundle(options)
    writers = report_writers(options, Path(options.out))
    here = world_size() is None
    with json_on_standard_output(options.json, lambda: read_report(paths[0]) if here or is_rank_0() else None):
        return (_launch if here else _take_part)(entry, options, paths, writers)


def _launch(entry: Entry, options: argparse.Namespace, paths: tuple[str, ...], writers: dict[Path, Writer]) -> int:
    from distbench.cli.launching import exported, hold_bench
    from distbench.report.bundle.layout import bundle_folder
    from distbench.report.console import print_report, print_start
    from distbench.report.files import read_report
    from distbench.report.results import Results

    out, baseline = Path(options.out), read_baseline(options)
    results = Results(out)
    with hold_bench([entry], options, lambda: _forget(out, paths)) as bench:
        print_start(entry.case)
        with exported(results, writers):
            summary = bench.run(Progress(1, what="run", each=False, expected=False), report_paths=paths)
        report = read_report(paths[0])
        print_report(report)
        for event in summary.events:
            print_text(f"event: {event}")
        if options.bundle and report.exit_code:
            _print_bundle(bundle_folder(options.bundle, entry.case), entry.case)
        code = worst_exit_code((report.exit_code, summary.exit_code))
        bench.nodes.exit_code = judge_baseline(options, baseline, results, code)
    return bench.nodes.exit_code


def _print_bundle(folder: Path, case: Case) -> None:
    """Print the folder of a bundle and the contents left out, or the reason why there is none."""
    from distbench.cli.shrink import code_flags
    from distbench.report.bundle.read import open_bundle

    try:
        cuts = open_bundle(folder).manifest.cuts
    except InvalidCase as error:
        print_text(f"no {error}")
        return
    print_text(f"bundle: {folder}; distbench replay {folder}{code_flags(case)}")
    for cut in cuts:
        print_text(f"left out of the bundle: {cut}")


def _take_part(entry: Entry, options: argparse.Namespace, paths: tuple[str, ...], writers: dict[Path, Writer]) -> int:
    from distbench.cli.launching import take_part
    from distbench.launcher.job import Job
    from distbench.report.results import Results

    out = Path(options.out)
    job = Job(
        entries=(entry,),
        out=options.out,
        report_paths=paths,
        bundle=options.bundle,
        supervised=False,
        started=world_size() or 0,
    )
    return take_part(job, options, lambda: _forget(out, paths), Results(out), writers)


def _forget(out: Path, paths: tuple[str, ...]) -> None:
    """Remove an earlier run's result from the folder.

    Raises:
        InvalidCase: the folder holds other results.

    """
    from distbench.report.journal import replace_results

    replace_results(out, _SUITE, _NAME.__eq__)
    for path in paths:
        Path(path).unlink(missing_ok=True)
