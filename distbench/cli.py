"""The commands: parse, then hand over."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from distbench import __version__
from distbench.campaign import Campaign, Rules, Summary
from distbench.case import (
    DERIVED_KEYS,
    FIELD_DEFAULTS,
    FIELD_HINTS,
    FLAGS,
    Layer,
    Resolved,
    load_case_file,
    resolve_case,
)
from distbench.errors import DistbenchError, InvalidCase
from distbench.job import Entry, Job
from distbench.models import PRESETS, ModelShape
from distbench.preflight import check_case, check_folder
from distbench.production import near_misses, read_environment
from distbench.progress import Progress
from distbench.report.console import print_error, print_presets, print_report
from distbench.report.files import read_report
from distbench.report.journal import RESULTS
from distbench.supervisor import Interrupted, preload_ranks

_CASE_DEST = "case_"
_DEFAULT_OUT = "distbench-out"
_REPORT = "report.json"
_NOT_FLAGS = (*DERIVED_KEYS, "ep_size")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        options = _parser().parse_args(arguments)
        return int(options.command(options))
    except DistbenchError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print_error(error.verdict.value, str(error))
        return error.exit_code
    except Interrupted as error:
        print_error("INTERRUPTED", f"{error}; what had finished is kept, the same command goes on from there")
        return error.exit_code


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
    run.add_argument("--nproc", type=int, metavar="N", help="ranks to start on this machine (default: 8)")
    run.add_argument("--case", metavar="FILE", help="case file, .toml or .json; each option below is a key of it")
    run.add_argument("--out", metavar="DIR", default=_DEFAULT_OUT, help="folder for report.json (default: %(default)s)")
    run.add_argument("--json", metavar="PATH", default="", help="write the report here too")
    group = run.add_argument_group("the case")
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
    resolved = _resolve(options, _world_size())
    check_folder(options.out)
    warnings = (*near_misses(os.environ), *check_case(resolved.case))
    entry = Entry(name="run", case=resolved.case, sources=resolved.sources, warnings=warnings)
    paths = tuple(path for path in (str(Path(options.out) / _REPORT), options.json) if path)
    for path in (*paths, str(Path(options.out) / RESULTS)):
        Path(path).unlink(missing_ok=True)
    if _world_size() is not None:
        return _work(Job(entries=(entry,), out=options.out, report_paths=paths, supervised=False))
    _campaign((entry,), options.out, Rules(), Progress(1, quiet=True), paths)
    report = read_report(paths[0])
    print_report(report)
    return report.exit_code


def _campaign(
    entries: Sequence[Entry], out: str, rules: Rules, progress: Progress, report_paths: tuple[str, ...] = ()
) -> Summary:
    preload_ranks()
    return Campaign(entries, Path(out), rules, progress).run(report_paths)


def _work(job: Job) -> int:
    from distbench.worker import work  # noqa: PLC0415 - loads torch, which other commands do without

    return work(job)


def _world_size() -> int | None:
    """Return the number of ranks where torchrun started this process as one of them."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def _resolve(options: argparse.Namespace, world_size: int | None) -> Resolved:
    given = {
        name.removeprefix(_CASE_DEST): str(value)
        for name, value in vars(options).items()
        if name.startswith(_CASE_DEST) and value is not None
    }
    layers = [Layer(FLAGS, given, strict=False)]
    if options.case:
        layers.append(load_case_file(options.case))
    layers += read_environment(os.environ)
    if world_size is not None and options.nproc not in (None, world_size):
        message = f"--nproc {options.nproc}: torchrun started {world_size} ranks; leave --nproc out under torchrun"
        raise InvalidCase(message)
    return resolve_case(layers, options.nproc if world_size is None else world_size)


def _presets(_: argparse.Namespace) -> int:
    columns = ("model", "hidden", "intermediate", "experts", "top-k")
    print_presets([(name, *_preset_numbers(shape)) for name, shape in PRESETS.items()], columns)
    return 0


def _preset_numbers(shape: ModelShape) -> tuple[str, ...]:
    experts = str(shape.num_experts) if shape.num_experts else f"{shape.experts_per_rank} a rank"
    return str(shape.hidden_size), str(shape.intermediate_size), experts, str(shape.topk)


def _show(options: argparse.Namespace) -> int:
    print_report(read_report(options.report))
    return 0
