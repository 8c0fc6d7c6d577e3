"""The commands: parse, then hand over."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args, get_origin

from distbench import __version__
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
from distbench.errors import DistbenchError, InvalidCase, Verdict
from distbench.job import Job
from distbench.models import PRESETS, ModelShape
from distbench.production import near_misses, read_environment

_CASE_DEST = "case_"
_DEFAULT_OUT = "distbench-out"
_NOT_FLAGS = (*DERIVED_KEYS, "ep_size")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    try:
        options = _parser().parse_args(arguments)
        return int(options.command(options))
    except DistbenchError as error:
        from distbench.report.console import print_error  # noqa: PLC0415 - only where something is printed

        if int(os.environ.get("RANK", "0")) == 0:
            print_error(error.verdict, str(error))
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
    started_ns = time.monotonic_ns()
    supervised = "TORCHELASTIC_RUN_ID" not in os.environ
    if supervised:
        from distbench.supervisor import preload_ranks  # noqa: PLC0415 - a rank under torchrun has no supervisor

        preload_ranks()
    resolved = _resolve(options, None if supervised else int(os.environ["WORLD_SIZE"]))
    from distbench.preflight import check_case, check_folder  # noqa: PLC0415 - loads torch

    check_folder(options.out)
    job = Job(
        case=resolved.case,
        sources=resolved.sources,
        warnings=[*near_misses(os.environ), *check_case(resolved.case)],
        out=options.out,
        json_path=options.json,
        supervised=supervised,
        started_ns=started_ns,
    )
    if supervised:
        return _supervise(job)
    from distbench.worker import work  # noqa: PLC0415 - loads torch, which other commands do without

    return work(job)


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


def _supervise(job: Job) -> int:
    from distbench.report.console import print_error, print_report  # noqa: PLC0415
    from distbench.report.files import read_report  # noqa: PLC0415
    from distbench.supervisor import LaunchFailed, launch  # noqa: PLC0415

    path = Path(job.out) / "report.json"
    path.unlink(missing_ok=True)
    try:
        launch(job)
    except LaunchFailed as error:
        print_error(Verdict.RANK_FAULT, str(error))
        return Verdict.RANK_FAULT.exit_code
    report = read_report(str(path))
    print_report(report)
    return report.exit_code


def _presets(_: argparse.Namespace) -> int:
    from distbench.report.console import print_presets  # noqa: PLC0415

    columns = ("model", "hidden", "intermediate", "experts", "top-k")
    print_presets([(name, *_preset_numbers(shape)) for name, shape in PRESETS.items()], columns)
    return 0


def _preset_numbers(shape: ModelShape) -> tuple[str, ...]:
    experts = str(shape.num_experts) if shape.num_experts else f"{shape.experts_per_rank} a rank"
    return str(shape.hidden_size), str(shape.intermediate_size), experts, str(shape.topk)


def _show(options: argparse.Namespace) -> int:
    from distbench.report.console import print_report  # noqa: PLC0415
    from distbench.report.files import read_report  # noqa: PLC0415

    print_report(read_report(options.report))
    return 0
