"""The commands: parse, then hand over."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

import msgspec

from distbench import __version__
from distbench.campaign import Campaign, Rules
from distbench.case import DERIVED_KEYS, FIELD_DEFAULTS, FIELD_HINTS, Case
from distbench.collect import collect
from distbench.errors import DistbenchError, InvalidCase
from distbench.job import Entry, Job
from distbench.locks import hold
from distbench.models import PRESETS, ModelShape
from distbench.preflight import check_case, check_folder, check_memory, check_path
from distbench.production import near_misses, read_environment
from distbench.progress import Progress
from distbench.report.console import print_error, print_presets, print_report, print_start, print_summary
from distbench.report.files import read_report
from distbench.report.journal import RESULTS, filter_journal
from distbench.report.summary import Summary
from distbench.resolve import FLAGS, Layer, load_case_file, resolve_case
from distbench.suite import load_suite, select
from distbench.suite_files import builtin_suites
from distbench.supervisor import Interrupted, preload_ranks

_CASE_DEST = "case_"
_DEFAULT_OUT = "distbench-out"
_DEFAULT_RANKS = 8
_SIGINT_EXIT_CODE = 130
_REPORT = "report.json"
_RANK_0_SPEAKS_S = 3.0
_NOT_FLAGS = (*DERIVED_KEYS, "ep_size")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        options = _parser().parse_args(arguments)
        return int(options.command(options))
    except DistbenchError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print_error(error.label, str(error))
        else:
            time.sleep(_RANK_0_SPEAKS_S)  # torchrun ends all ranks as soon as one has left
        return error.exit_code
    except Interrupted as error:
        print_error("INTERRUPTED", f"{error}; what had finished is kept, the same command goes on from there")
        return error.exit_code
    except KeyboardInterrupt:
        print_error("INTERRUPTED", "ended by SIGINT; no rank is left")
        return _SIGINT_EXIT_CODE


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        complaint = f"{message}; see `{self.prog} --help`"
        raise InvalidCase(complaint)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="distbench",
        description="Does cutting the rows in front of fused_moe change a bit, on any rank?",
        epilog="Exit codes: 0 PASS, 1 a wrong result, 2 INVALID, 3 HANG or RANK_FAULT, 77 UNSUPPORTED.",
    )
    parser.add_argument("--version", action="version", version=f"distbench {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_suite(commands)
    collected = commands.add_parser("collect", help="verdicts from the folder of a torchrun job that has ended")
    collected.add_argument("folder", metavar="DIR", help="the job's --out")
    collected.set_defaults(command=_collect)
    presets = commands.add_parser("presets", help="list the model layers by name")
    presets.set_defaults(command=_presets)
    show = commands.add_parser("show", help="print a report again")
    show.add_argument("report", metavar="REPORT", help="a report.json")
    show.set_defaults(command=_show)
    return parser


def _add_run(commands: Any) -> None:
    run = commands.add_parser(
        "run",
        help="run one case: padded against truncated, bit for bit",
        description="Run one case. Flags win over the case file, that over the SGLANG_MORI_* variables, those over "
        "defaults. Under torchrun this process is a rank; otherwise it starts the ranks.",
    )
    run.set_defaults(command=_run)
    _add_launch(run)
    run.add_argument("--case", metavar="FILE", help="case file, .toml or .json; each option below is a key of it")
    run.add_argument("--json", metavar="PATH", default="", help="write the report here too")
    _add_case_options(run)


def _add_suite(commands: Any) -> None:
    suite = commands.add_parser(
        "suite",
        help="run many cases in one launch",
        description=f"Run the cases of a suite file, or of a built-in suite ({', '.join(builtin_suites())}). The same "
        "command with the same --out goes on where it was stopped.",
    )
    suite.set_defaults(command=_suite)
    suite.add_argument("suite", metavar="FILE|NAME", help="suite file, .toml or .json, or the name of a built-in one")
    _add_launch(suite)
    suite.add_argument(
        "--select", metavar="TERMS", default="", help="tags, key=value, name~text; ! negates, comma ands"
    )
    suite.add_argument("--rerun", choices=("failed", "all"), help="run again what had failed, or everything")
    suite.add_argument("--retries", type=int, default=0, metavar="N", help="tries more for a case that lost its ranks")
    suite.add_argument("--max-faults", type=int, default=3, metavar="K", help="stop after K such cases in a row")
    suite.add_argument("--quiet", action="store_true", help="no progress")
    _add_case_options(suite)


def _add_launch(command: Any) -> None:
    command.add_argument("--nproc", type=int, metavar="N", help="ranks to start on this machine (default: 8)")
    command.add_argument("--out", metavar="DIR", default=_DEFAULT_OUT, help="folder for results (default: %(default)s)")
    command.add_argument(
        "--lock-timeout", type=float, default=0.0, metavar="S", help="seconds to wait for another bench in that folder"
    )


def _add_case_options(command: Any) -> None:
    group = command.add_argument_group("the case")
    for key in FIELD_HINTS:
        if key not in _NOT_FLAGS:
            _add_case_option(group, key)


def _add_case_option(group: Any, key: str) -> None:
    kind, *notes = get_args(FIELD_HINTS[key])
    default = FIELD_DEFAULTS.get(key)
    shown = default[0] if isinstance(default, tuple) else default
    text = notes[-1].description + ("" if shown in (None, "", False) else f" (default: {shown})")
    flag, dest = "--" + key.replace("_", "-"), _CASE_DEST + key
    if kind is bool:
        group.add_argument(flag, dest=dest, default=None, action=argparse.BooleanOptionalAction, help=text)
        return
    metavar = "|".join(get_args(kind)) if get_origin(kind) is Literal else key.rsplit("_", 1)[-1].upper()
    group.add_argument(flag, dest=dest, default=None, metavar=metavar, help=text)


def _run(options: argparse.Namespace) -> int:
    layers = [*_flags(options), *([load_case_file(options.case)] if options.case else [])]
    resolved = resolve_case([*layers, *read_environment(os.environ)], _num_ranks(options))
    entry = Entry(name="run", case=resolved.case, sources=resolved.sources, warnings=_warnings(resolved.case))
    paths = tuple(path for path in (str(Path(options.out) / _REPORT), options.json) if path)
    for path in paths:
        check_path(path)
        check_folder(str(Path(path).parent), 1)
    if _world_size() is not None:
        _forget(Path(options.out), paths)
        return _work(Job(entries=(entry,), out=options.out, report_paths=paths, supervised=False))
    check_memory([resolved.case])
    print_start(resolved.case)
    with hold(Path(options.out), (), options.lock_timeout):
        _forget(Path(options.out), paths)
        _campaign((entry,), options, Progress(1, quiet=True), paths)
        report = read_report(paths[0])
    print_report(report)
    return report.exit_code


def _suite(options: argparse.Namespace) -> int:
    num_ranks = _num_ranks(options) or _DEFAULT_RANKS
    suite = load_suite(options.suite, num_ranks, _flags(options), read_environment(os.environ))
    chosen = select(suite.entries, options.select)
    check_path(options.out)
    entries = tuple(msgspec.structs.replace(entry, warnings=_warnings(entry.case)) for entry in chosen)
    check_folder(options.out, len(entries))
    if _world_size() is not None:
        return _work(Job(entries=entries, out=options.out, supervised=False))
    check_memory(entry.case for entry in entries)
    out = Path(options.out)
    progress = Progress(len(entries), quiet=options.quiet)
    with hold(out, (), options.lock_timeout):
        if options.rerun == "all":
            (out / RESULTS).unlink(missing_ok=True)
        elif options.rerun == "failed":
            filter_journal(out, lambda line: line.as_expected)
        summary = _campaign(entries, options, progress)
    print_summary(summary, options.out)
    return summary.exit_code


def _campaign(
    entries: Sequence[Entry], options: argparse.Namespace, progress: Progress, report_paths: tuple[str, ...] = ()
) -> Summary:
    rules = Rules(retries=getattr(options, "retries", 0), max_faults=getattr(options, "max_faults", 1))
    preload_ranks()
    try:
        return Campaign(entries, Path(options.out), rules, progress).run(report_paths)
    finally:
        progress.close()


def _forget(out: Path, paths: tuple[str, ...]) -> None:
    for path in (*paths, str(out / RESULTS)):
        Path(path).unlink(missing_ok=True)


def _warnings(case: Case) -> tuple[str, ...]:
    return (*near_misses(os.environ), *check_case(case))


def _flags(options: argparse.Namespace) -> list[Layer]:
    given = {
        name.removeprefix(_CASE_DEST): str(value)
        for name, value in vars(options).items()
        if name.startswith(_CASE_DEST) and value is not None
    }
    return [Layer(FLAGS, given, strict=False)]


def _num_ranks(options: argparse.Namespace) -> int | None:
    """Return the number of ranks that torchrun started, or that --nproc asks for, or None."""
    started = _world_size()
    if started is not None and options.nproc not in (None, started):
        message = f"--nproc {options.nproc}: torchrun started {started} ranks; leave --nproc out under torchrun"
        raise InvalidCase(message)
    return options.nproc if started is None else started


def _work(job: Job) -> int:
    from distbench.worker import work  # noqa: PLC0415 - loads torch, which other commands do without

    return work(job)


def _world_size() -> int | None:
    """Return the number of ranks where torchrun started this process as one of them."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def _presets(_: argparse.Namespace) -> int:
    columns = ("model", "hidden", "intermediate", "experts", "top-k")
    print_presets([(name, *_preset_numbers(shape)) for name, shape in PRESETS.items()], columns)
    return 0


def _preset_numbers(shape: ModelShape) -> tuple[str, ...]:
    experts = str(shape.num_experts) if shape.num_experts else f"{shape.experts_per_rank} a rank"
    return str(shape.hidden_size), str(shape.intermediate_size), experts, str(shape.topk)


def _collect(options: argparse.Namespace) -> int:
    summary = collect(Path(options.folder))
    print_summary(summary, options.folder)
    return summary.exit_code


def _show(options: argparse.Namespace) -> int:
    print_report(read_report(options.report))
    return 0
