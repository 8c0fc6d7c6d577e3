"""What the commands that run cases share: their options, the number of ranks, and the campaign."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from distbench.campaign import Campaign, Rules
from distbench.case import DERIVED_KEYS, FIELD_DEFAULTS, FIELD_HINTS, Case
from distbench.errors import InvalidCase
from distbench.export import FILES, Writer, load_writers, parse_targets
from distbench.job import Entry, Job
from distbench.preflight import check_case, check_devices, check_folder, check_memory, check_path
from distbench.production import near_misses
from distbench.progress import Progress
from distbench.report.summary import Summary
from distbench.resolve import FLAGS, Layer, resolve_case
from distbench.supervisor import preload_ranks
from distbench.trials import load_layer

_CASE_DEST = "case_"
_DEFAULT_OUT = "distbench-out"
_NOT_FLAGS = (*DERIVED_KEYS, "ep_size")


def add_launch(command: Any) -> None:
    """Add the options of a launch: ranks, folder, lock."""
    command.add_argument("--nproc", type=int, metavar="N", help="ranks to start on this machine (default: 8)")
    add_folder(command)
    command.add_argument(
        "--bundle", metavar="DIR", default="", help="leave a bundle of each case that fails in a folder of its own here"
    )


def add_folder(command: Any) -> None:
    """Add the options of whatever writes results: folder, lock."""
    command.add_argument("--out", metavar="DIR", default=_DEFAULT_OUT, help="folder for results (default: %(default)s)")
    command.add_argument(
        "--lock-timeout", type=float, default=0.0, metavar="S", help="seconds to wait for another bench in that folder"
    )


def add_report(command: Any, *, required: bool = False) -> None:
    """Add the option that names formats of results."""
    formats = ",".join(FILES)
    command.add_argument(
        "--report",
        metavar="FORMATS",
        default="",
        required=required,
        help=f"write results as {formats}; FORMAT=PATH names the file, else one in the results' folder",
    )


def report_writers(options: argparse.Namespace, out: Path) -> dict[Path, Writer]:
    """Return what --report asks for, its libraries loaded and its folders there."""
    targets = parse_targets(options.report, out)
    for path in targets.values():
        check_path(str(path))
        check_folder(str(path.parent), 1)
    return load_writers(targets)


def add_case_options(command: Any, keys: Sequence[str] = tuple(FIELD_HINTS)) -> None:
    """Add an option for each of `keys` of a case."""
    group = command.add_argument_group("the case")
    for key in keys:
        if key not in _NOT_FLAGS:
            _add_case_option(group, key)


def _add_case_option(group: Any, key: str) -> None:
    kind, *notes = get_args(FIELD_HINTS[key])
    default = FIELD_DEFAULTS.get(key)
    shown = default[0] if isinstance(default, tuple) else default
    text = notes[-1].description.replace("%", "%%") + ("" if shown in (None, "", False) else f" (default: {shown})")
    flag, dest = "--" + key.replace("_", "-"), _CASE_DEST + key
    if kind is bool:
        group.add_argument(flag, dest=dest, default=None, action=argparse.BooleanOptionalAction, help=text)
        return
    metavar = "|".join(get_args(kind)) if get_origin(kind) is Literal else key.rsplit("_", 1)[-1].upper()
    group.add_argument(flag, dest=dest, default=None, metavar=metavar, help=text)


def case_flags(options: argparse.Namespace) -> list[Layer]:
    """Return what the command line says of the case."""
    given = {
        name.removeprefix(_CASE_DEST): str(value)
        for name, value in vars(options).items()
        if name.startswith(_CASE_DEST) and value is not None
    }
    return [Layer(FLAGS, given, strict=False)]


def one_case(path: str, options: argparse.Namespace) -> Case:
    """Return the case of a case file or a report, with what the command line says of it, ready to run.

    Raises:
        InvalidCase: no such file, or a case that makes no sense.

    """
    case = resolve_case([*case_flags(options), load_layer(path)], options.nproc).case
    check_case(case)
    check_folder(options.out, 1)
    return case


def alone(command: str) -> None:
    """Refuse to be started by torchrun: launch after launch is this process's own.

    Raises:
        InvalidCase: torchrun started this process.

    """
    if world_size() is not None:
        message = f"{command} starts its ranks itself; run it without torchrun"
        raise InvalidCase(message)


def num_ranks(options: argparse.Namespace) -> int | None:
    """Return the number of ranks that torchrun started, or that --nproc asks for, or None."""
    started = world_size()
    if started is not None and options.nproc not in (None, started):
        message = f"--nproc {options.nproc}: torchrun started {started} ranks; leave --nproc out under torchrun"
        raise InvalidCase(message)
    return options.nproc if started is None else started


def world_size() -> int | None:
    """Return the number of ranks where torchrun started this process as one of them."""
    return int(os.environ["WORLD_SIZE"]) if "TORCHELASTIC_RUN_ID" in os.environ else None


def is_rank_0() -> bool:
    """Whether this process is rank 0 of those that torchrun started."""
    return os.environ.get("RANK") == "0"


def warnings(case: Case) -> tuple[str, ...]:
    """Return what the reader of the case's report should know of it."""
    return (*near_misses(os.environ), *check_case(case))


def check_launch(cases: Sequence[Case]) -> tuple[str, ...]:
    """Refuse what this machine has no devices or no memory for; return the devices that the launch takes."""
    devices = check_devices(cases, max(case.ep_size for case in cases))
    on_cpu = [case for case in cases if case.device == "cpu" or not devices]
    if on_cpu:
        check_memory(on_cpu)
    return devices


def campaign(
    entries: Sequence[Entry], options: argparse.Namespace, progress: Progress, report_paths: tuple[str, ...] = ()
) -> Summary:
    """Run the entries to their end, starting ranks as often as it takes."""
    rules = Rules(retries=getattr(options, "retries", 0), max_faults=getattr(options, "max_faults", 1))
    preload_ranks()
    try:
        return Campaign(entries, Path(options.out), rules, progress, options.bundle).run(report_paths)
    finally:
        progress.close()


def work(job: Job) -> int:
    """Do the job as one of the ranks that torchrun started; return the exit code."""
    from distbench.worker import work  # noqa: PLC0415 - loads torch, which other commands do without

    return work(job)
