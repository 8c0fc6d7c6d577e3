"""Common parts of the commands that run cases: options, number of ranks, campaign."""

from __future__ import annotations

import argparse
import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

from distbench.case.groups import COMMON, COUNTS, GROUPS, UNITS
from distbench.case.plugins import OPTION_KEYS
from distbench.case.spec import FIELD_DEFAULTS, FIELD_HINTS, Case
from distbench.cli.argument_types import MOST_RANKS, plain_counts, seconds, whole
from distbench.cli.multi_node import layout_of
from distbench.cli.torchrun_rank import world_size
from distbench.errors import InvalidCase
from distbench.report import export
from distbench.report.export import FILES
from distbench.report.terminal import print_json
from distbench.utils.text import counted

if TYPE_CHECKING:
    from distbench.case.resolve import Layer
    from distbench.report.schema import Report

_CASE_DEST = "case_"
DEFAULT_OUT = "distbench-out"


def add_launch(command: Any) -> None:
    """Add the options of a launch: ranks, folder, lock."""
    add_ranks(command, "ranks to start on this machine (default: 8)")
    add_folder(command)
    output_of(command).add_argument(
        "--bundle", metavar="DIR", default="", help="write a bundle of each failing case into its own folder in DIR"
    )


def check_bundle(options: argparse.Namespace) -> None:
    """Make the folder for bundles, where requested, and prove that it can be written."""
    from distbench.launcher.preflight import check_folder, check_path

    if options.bundle:
        check_path(options.bundle)
        check_folder(options.bundle)


def output_of(command: Any) -> Any:
    """Group of the options for files."""
    return command.group("output", "files, formats and locks")


def add_ranks(command: Any, text: str) -> None:
    """Add the option for the number of ranks."""
    command.add_argument("-n", "--nproc", type=whole(1, MOST_RANKS), metavar="RANKS", help=text)


def add_folder(command: Any) -> None:
    """Add the options of commands that write results: a folder, by default the command's own, and its lock."""
    own = f"{DEFAULT_OUT}/{command.prog.split()[-1]}"
    command.add_argument("--out", metavar="DIR", default=own, help="folder for results (default: %(default)s)")
    add_lock_timeout(command)


def add_lock_timeout(command: Any) -> None:
    """Add the option for the time to wait for another bench."""
    output_of(command).add_argument(
        "--lock-timeout",
        type=seconds(),
        default=0.0,
        metavar="SECONDS",
        help="time to wait for another bench in that folder, or on these devices",
    )


def add_report(
    command: Any, written: Iterable[str] = FILES, *, folder: str = "the results' folder", required: bool = False
) -> None:
    """Add the option for the formats of results, those `written` by the command, by default into `folder`."""
    formats = ",".join(written)
    output_of(command).add_argument(
        "--report",
        metavar="FORMATS",
        action="append",
        default=[],
        required=required,
        help=f"write results as {formats}, repeatable; FORMAT=PATH names the file, else one in {folder}",
    )


def add_voice(command: Any) -> None:
    """Add the options for less and more text; the command line sets them for the whole process."""
    how = output_of(command).add_mutually_exclusive_group()
    how.add_argument("-q", "--quiet", action="store_true", help="print the result alone: no progress, no tables")
    how.add_argument("-v", "--verbose", action="store_true", help="print every rank, and every case as it ends")


def add_json(command: Any, what: str) -> None:
    """Add the option for the file of a JSON document."""
    text = f"also write {what} here; - for standard output, and the text for people then goes to standard error"
    output_of(command).add_argument("--json", metavar="PATH", default="", help=text)


@contextlib.contextmanager
def json_on_standard_output(path: str, document: Callable[[], Any]) -> Iterator[None]:
    """Redirect printing in this context to standard error where `path` is `-`, and print `document()` as JSON after it.

    `document` is called where the context ends without an error, and may return None for no document.
    """
    from distbench.report.export import STANDARD_OUTPUT

    if path != str(STANDARD_OUTPUT):
        yield
        return
    with contextlib.redirect_stdout(sys.stderr):
        yield
    made = document()
    if made is not None:
        print_json(made)


def report_writers(
    options: argparse.Namespace, out: Path, package: str = export.__name__, *, silent: bool = False
) -> dict[Path, Any]:
    """Writers for --report, with their libraries loaded and folders made. `package` has a module per format.

    Standard output as a target requires a command that is otherwise `silent` there.

    Raises:
        InvalidCase: a format, path or folder that is not allowed.

    """
    from distbench.launcher.preflight import check_folder, check_path
    from distbench.report.export import STANDARD_OUTPUT, load_writers, parse_targets

    targets = parse_targets(",".join(options.report), out)
    for path in targets.values():
        if path == STANDARD_OUTPUT and silent:
            continue
        if path == STANDARD_OUTPUT:
            later = ", or: distbench report DIR --report …=-" if package == export.__name__ else ""
            message = f"report -: standard output has the command's own text; name a file{later}"
            raise InvalidCase(message)
        check_path(str(path))
        check_folder(str(path.parent))
    return load_writers(targets, package)


def add_case_options(command: Any, keys: Sequence[str] = tuple(UNITS)) -> None:
    """Add an option for each of `keys` of a case, in their groups."""
    for title, group in GROUPS.items():
        asked = [key for key in group.units if key in keys]
        options = command.group(title, group.text) if asked else None
        for key in asked:
            _add_case_option(options, key, group.units[key])
    command.common = {
        _CASE_DEST + key: (f"--{key.replace('_', '-')} {UNITS[key] or 'WORD'}", text) for key, text in COMMON.items()
    }


def _add_case_option(group: Any, key: str, unit: str) -> None:
    kind, *notes = get_args(FIELD_HINTS[key])
    default = FIELD_DEFAULTS.get(key)
    shown = next(iter(default), None) if isinstance(default, tuple) else default
    text = notes[-1].description.replace("%", "%%") + ("" if shown in (None, "", False) else f" (default: {shown})")
    flag, dest = "--" + key.replace("_", "-"), _CASE_DEST + key
    if key == "graph":
        group.add_argument(flag, dest=dest, default=None, metavar="experts|layer", help=text)
        group.add_argument("--no-graph", dest=dest, action="store_const", const="false", help=argparse.SUPPRESS)
        return
    if kind is bool:
        group.add_argument(flag, dest=dest, default=None, action=argparse.BooleanOptionalAction, help=text)
        return
    if key in OPTION_KEYS:
        group.add_argument(flag, dest=dest, default=None, metavar=unit, action="append", help=text)
        return
    metavar = unit or "|".join(get_args(kind))
    group.add_argument(flag, dest=dest, default=None, metavar=metavar, help=text)


def case_flags(options: argparse.Namespace) -> list[Layer]:
    """Layers of the command line's options for the case."""
    from distbench.case.resolve import FLAGS, Layer

    texts = {
        name.removeprefix(_CASE_DEST): ";".join(value) if isinstance(value, list) else str(value)
        for name, value in vars(options).items()
        if name.startswith(_CASE_DEST) and value is not None
    }
    given = {key: plain_counts(text) if key in COUNTS else text for key, text in texts.items()}
    return [Layer(FLAGS, given, strict=False)]


def one_case(path: str, options: argparse.Namespace) -> Case:
    """Case of a case file or a report, overridden by the command line, ready to run.

    Raises:
        InvalidCase: a missing file, or an invalid case.

    """
    from distbench.case.resolve import resolve_case
    from distbench.launcher.preflight import check_case, check_folder
    from distbench.report.input_file import load_layer

    case = resolve_case([*case_flags(options), load_layer(path)], options.nproc).case
    check_case(case)
    check_folder(options.out)
    return case


def known_report(path: str, options: argparse.Namespace) -> Report | None:
    """Report in `path`; None where it holds a case, or the command line overrides it."""
    from distbench.report.input_file import load_report

    return load_report(path) if not case_flags(options)[0].values else None


def num_ranks(options: argparse.Namespace) -> int | None:
    """Number of ranks that torchrun started, or that --nproc requests, or None."""
    started = world_size()
    if started is not None and options.nproc not in (None, started):
        message = (
            f"--nproc {options.nproc}: torchrun started {counted(started, 'rank')}; leave --nproc out under torchrun"
        )
        raise InvalidCase(message)
    layout = layout_of(options)
    if layout is not None:
        return layout.nodes * layout.nproc
    return options.nproc if started is None else started
