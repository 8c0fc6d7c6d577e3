"""Common parts of the commands that run cases: options, number of ranks, campaign."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import msgspec

from distbench.case.entry import Entry
from distbench.case.expectations import BY_KERNEL, expected_verdict
from distbench.case.resolve import FLAGS, Layer, resolve_case
from distbench.case.sglang_env import near_misses
from distbench.case.spec import DERIVED_KEYS, FIELD_DEFAULTS, FIELD_HINTS, Case
from distbench.case.unused_keys import note_of_keys, unused_keys
from distbench.commands.nodes import nodes_of, spread_of
from distbench.commands.numbers import MOST_RANKS, seconds, whole
from distbench.commands.ranks import is_rank_0, world_size
from distbench.errors import DistbenchError, InvalidCase, Unsupported, Verdict
from distbench.launcher.agent import preload_ranks
from distbench.launcher.campaign import Campaign, Rules
from distbench.launcher.job import Spread
from distbench.launcher.locks import hold
from distbench.launcher.memory import available_bytes, check_memory
from distbench.launcher.nodes.interfaces import check_interfaces, choose_interfaces, choose_loopback
from distbench.launcher.nodes.leader import Hub
from distbench.launcher.nodes.secret import VARIABLE as SECRET
from distbench.launcher.nodes.secret import read_secret
from distbench.launcher.preflight import adds_atomically, check_case, check_devices, check_folder, check_path
from distbench.launcher.resources import allow_open_files, check_shared_memory
from distbench.launcher.unused_variables import note_of_launch, unused_variables
from distbench.report import export
from distbench.report.console import print_json, print_note
from distbench.report.export import FILES, STANDARD_OUTPUT, Writer, load_writers, parse_targets, write_reports
from distbench.report.input_file import load_layer, load_report
from distbench.report.journal import Summary
from distbench.report.progress import Progress
from distbench.report.results import Results
from distbench.report.schema import Report
from distbench.utils.devices import count_devices

_CASE_DEST = "case_"
DEFAULT_OUT = "distbench-out"
_NOT_FLAGS = (*DERIVED_KEYS, "ep_size")


def add_launch(command: Any) -> None:
    """Add the options of a launch: ranks, folder, lock."""
    add_ranks(command, "ranks to start on this machine (default: 8)")
    add_folder(command)
    command.add_argument(
        "--bundle", metavar="DIR", default="", help="write a bundle of each failing case into its own folder in DIR"
    )


def check_bundle(options: argparse.Namespace) -> None:
    """Make the folder for bundles, where requested, and prove that it can be written."""
    if options.bundle:
        check_path(options.bundle)
        check_folder(options.bundle)


def add_ranks(command: Any, text: str) -> None:
    """Add the option for the number of ranks."""
    command.add_argument("--nproc", type=whole(1, MOST_RANKS), metavar="N", help=text)


def follow_node_0(options: argparse.Namespace) -> int | None:
    """Take part as a node that is not node 0; None where this is node 0.

    Raises:
        InvalidCase: the nodes have no secret, or different ones.

    """
    spread = spread_of(options)
    if spread is None:
        return None
    secret = read_secret(spread.host, options.secret_file)
    if spread.node == 0:
        return None
    from distbench.launcher.follower import Timeouts, follow  # noqa: PLC0415 - only on such nodes

    out = Path(options.out) / f"node-{spread.node:05d}"
    check_folder(str(out))
    allow_open_files(spread.nproc, spread.nodes * spread.nproc)
    with hold(out, (), options.lock_timeout):
        prepare_ranks(spread)
        return follow(spread, secret, out, Timeouts(options.join_timeout, options.lock_timeout))


def prepare_ranks(spread: Spread | None = None) -> None:
    """Begin to import torch for the ranks, and select their interfaces: loopback for gloo and NCCL on one node.

    Raises:
        InvalidCase: gloo is configured to use a missing interface.

    """
    check_interfaces(accelerated=False)
    if spread is None:
        choose_loopback()
    else:
        chosen = choose_interfaces(spread.host, spread.port)
        print_note(f"node {spread.node} of {spread.nodes} on {socket.gethostname()}, {spread.nproc} ranks, {chosen}")
    os.environ.pop(SECRET, None)  # no rank needs it
    preload_ranks()


def add_folder(command: Any) -> None:
    """Add the options of commands that write results: a folder, by default the command's own, and its lock."""
    own = f"{DEFAULT_OUT}/{command.prog.split()[-1]}"
    command.add_argument("--out", metavar="DIR", default=own, help="folder for results (default: %(default)s)")
    add_lock_timeout(command)


def add_lock_timeout(command: Any) -> None:
    """Add the option for the time to wait for another bench."""
    command.add_argument(
        "--lock-timeout",
        type=seconds(),
        default=0.0,
        metavar="S",
        help="seconds to wait for another bench in that folder, or on these devices",
    )


def add_report(command: Any, *, required: bool = False) -> None:
    """Add the option for the formats of results."""
    formats = ",".join(FILES)
    command.add_argument(
        "--report",
        metavar="FORMATS",
        action="append",
        default=[],
        required=required,
        help=f"write results as {formats}, repeatable; FORMAT=PATH names the file, else one in the results' folder",
    )


def add_json(command: Any, what: str) -> None:
    """Add the option for the file of a JSON document."""
    text = f"also write {what} here; - for standard output, and the text for people then goes to standard error"
    command.add_argument("--json", metavar="PATH", default="", help=text)


@contextlib.contextmanager
def json_on_standard_output(path: str, document: Callable[[], Any]) -> Iterator[None]:
    """Redirect printing in this context to standard error where `path` is `-`, and print `document()` as JSON after it.

    `document` is called where the context ends without an error, and may return None for no document.
    """
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
    targets = parse_targets(",".join(options.report), out)
    for path in targets.values():
        if path == STANDARD_OUTPUT and silent:
            continue
        if path == STANDARD_OUTPUT:
            message = (
                "report -: standard output shows the run's progress; name a file, or: distbench report DIR --report …=-"
            )
            raise InvalidCase(message)
        check_path(str(path))
        check_folder(str(path.parent))
    return load_writers(targets, package)


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
    """Layers of the command line's options for the case."""
    given = {
        name.removeprefix(_CASE_DEST): str(value)
        for name, value in vars(options).items()
        if name.startswith(_CASE_DEST) and value is not None
    }
    return [Layer(FLAGS, given, strict=False)]


def one_case(path: str, options: argparse.Namespace) -> Case:
    """Case of a case file or a report, overridden by the command line, ready to run.

    Raises:
        InvalidCase: a missing file, or an invalid case.

    """
    case = resolve_case([*case_flags(options), load_layer(path)], options.nproc).case
    check_case(case)
    check_folder(options.out)
    return case


def known_report(path: str, options: argparse.Namespace) -> Report | None:
    """Report in `path`; None where it holds a case, or the command line overrides it."""
    return load_report(path) if not case_flags(options)[0].values else None


def num_ranks(options: argparse.Namespace) -> int | None:
    """Number of ranks that torchrun started, or that --nproc requests, or None."""
    started = world_size()
    if started is not None and options.nproc not in (None, started):
        message = f"--nproc {options.nproc}: torchrun started {started} ranks; leave --nproc out under torchrun"
        raise InvalidCase(message)
    spread = spread_of(options)
    if spread is not None:
        return spread.nodes * spread.nproc
    return options.nproc if started is None else started


def warnings(case: Case, sources: Mapping[str, str], options: argparse.Namespace) -> tuple[str, ...]:
    """Warnings for the reader of the case's report, in the launch that `options` request."""
    found = check_case(case, _local_ranks(options))
    unused = (*unused_variables(os.environ, case, sources), *unused_keys(case, sources))
    return (*near_misses(os.environ), *unused, *found)


def _local_ranks(options: argparse.Namespace) -> int | None:
    """Ranks of the launch on each node; None where all are on this one."""
    if world_size() is not None:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    spread = spread_of(options)
    return None if spread is None else spread.nproc


def examined(entries: Sequence[Entry], origin: str, options: argparse.Namespace) -> tuple[Entry, ...]:
    """Entries with their warnings; one that cannot run here, and is expected not to, is marked as refused.

    Devices are checked where this process starts the ranks; ranks of torchrun check them on their own.

    Raises:
        InvalidCase: an invalid case; names the file and the case, as does
        Unsupported: a case that needs something which this machine lacks.

    """
    local_ranks = -(-max(entry.case.ep_size for entry in entries) // nodes_of(options))
    available = count_devices() if any(entry.case.device != "cpu" for entry in entries) else 0

    def check(entry: Entry) -> tuple[str, ...]:
        if world_size() is None:
            check_devices([entry.case], local_ranks, available)
        return warnings(entry.case, entry.sources, options)

    found = tuple(_examined(entry, origin, check) for entry in entries)
    if world_size() is None or is_rank_0():
        for note in filter(None, (note_of_launch(os.environ, found), note_of_keys(found))):
            print_note(note)
    return found


def _examined(entry: Entry, origin: str, check: Callable[[Entry], tuple[str, ...]]) -> Entry:
    if entry.expect == BY_KERNEL:
        verdict = Verdict.NONDETERMINISTIC if adds_atomically(entry.case) else Verdict.PASS
        entry = msgspec.structs.replace(entry, expect=verdict.value)
    try:
        return msgspec.structs.replace(entry, warnings=check(entry))
    except (InvalidCase, Unsupported) as error:
        if expected_verdict(entry.expect) == error.verdict.value:
            return msgspec.structs.replace(entry, refused=str(error))
        message = f"{origin}: case {entry.name}: {error}"
        raise type(error)(message) from error


def check_launch(entries: Sequence[Entry], nodes: int = 1) -> tuple[str, ...]:
    """Refuse a launch that lacks devices or resources here; return the devices that it takes.

    `nodes` share the launch equally; only this machine's share is checked.
    """
    running = [entry for entry in entries if not entry.refused]
    if not running:
        return ()
    ranks = max(entry.case.ep_size for entry in running)
    local_ranks = -(-ranks // nodes)
    devices = check_devices([entry.case for entry in running], local_ranks)
    check_interfaces(accelerated=bool(devices))
    allow_open_files(local_ranks, ranks)
    for note in check_shared_memory(local_ranks, on_devices=bool(devices)):
        print_note(note)
    on_cpu = [entry for entry in running if entry.case.device == "cpu" or not devices]
    if on_cpu:
        check_memory(on_cpu, available_bytes() * nodes if nodes > 1 else None)
    return devices


@contextlib.contextmanager
def exported(results: Results, writers: Mapping[Path, Writer]) -> Iterator[None]:
    """Write `results` in other formats when the context ends. An error that ends it takes precedence."""
    try:
        yield
    except BaseException:
        try:
            write_reports(results, writers)
        except DistbenchError as error:
            print_note(f"no reports: {error}")
        raise
    write_reports(results, writers)


def campaign(
    entries: Sequence[Entry],
    options: argparse.Namespace,
    progress: Progress,
    report_paths: tuple[str, ...] = (),
    hub: Hub | None = None,
) -> Summary:
    """Run the entries to their end, with as many launches as needed, or until the deadline."""
    rules = Rules(
        retries=getattr(options, "retries", 0),
        max_faults=getattr(options, "max_faults", 1),
        deadline=getattr(options, "deadline", None),
    )
    try:
        prepare_ranks(spread_of(options))
        return Campaign(entries, Path(options.out), rules, progress, options.bundle, hub).run(report_paths)
    finally:
        progress.close()
