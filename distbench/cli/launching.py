"""Steps that every command which starts ranks shares."""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import msgspec

from distbench.case.entry import Entry
from distbench.case.expectations import BY_KERNEL, expected_verdict
from distbench.case.profiles import program_of
from distbench.case.sglang_env import near_misses
from distbench.case.sglang_epv2 import epv2_notes
from distbench.case.spec import Case
from distbench.case.unused_keys import note_of_keys, unused_keys
from distbench.cli.compare import judge_baseline, read_baseline
from distbench.cli.launcher_tasks import tell_task
from distbench.cli.multi_node import Nodes, layout_of, nodes_of, other_nodes
from distbench.cli.options import check_bundle
from distbench.cli.torchrun_rank import hold_as_rank, is_rank_0, work, world_size
from distbench.errors import DistbenchError, InvalidCase, Unsupported, Verdict
from distbench.launcher.agent import preload_ranks
from distbench.launcher.campaign import Campaign, Rules
from distbench.launcher.job import Job, NodeLayout
from distbench.launcher.locks import hold
from distbench.launcher.memory import available_bytes, check_device_memory, check_memory
from distbench.launcher.nodes.interfaces import check_interfaces, choose_interfaces, choose_loopback
from distbench.launcher.nodes.secret import VARIABLE as SECRET
from distbench.launcher.nodes.secret import read_secret
from distbench.launcher.preflight import adds_atomically, check_case, check_devices, check_folder, check_path
from distbench.launcher.resources import allow_open_files, check_shared_memory, report_bytes
from distbench.launcher.unused_variables import note_of_launch, unused_variables
from distbench.report.export import Writer, write_reports
from distbench.report.journal import Summary
from distbench.report.progress import Progress
from distbench.report.results import Results
from distbench.report.terminal import print_note
from distbench.tools.lab import Lab
from distbench.utils.devices import count_devices
from distbench.utils.text import counted

_ONE_FAULT = Rules(max_faults=1)


def follow_node_0(options: argparse.Namespace) -> int | None:
    """Take part as a node that is not node 0; None where this is node 0.

    Raises:
        InvalidCase: the nodes have no secret, or different ones.

    """
    layout = layout_of(options)
    if layout is None:
        return None
    secret = read_secret(layout.host, options.secret_file)
    if layout.node == 0:
        return None
    from distbench.launcher.follower import Timeouts, follow

    out = Path(options.out) / f"node-{layout.node:05d}"
    check_folder(str(out))
    allow_open_files(layout.nproc, layout.nodes * layout.nproc)
    with hold(out, (), options.lock_timeout):
        prepare_ranks(layout)
        return follow(layout, secret, out, Timeouts(options.join_timeout, options.lock_timeout))


def prepare_ranks(layout: NodeLayout | None = None) -> None:
    """Begin to import torch for the ranks, and select their interfaces: loopback for gloo and NCCL on one node.

    Raises:
        InvalidCase: gloo is configured to use a missing interface.

    """
    check_interfaces(accelerated=False)
    if layout is None:
        choose_loopback()
    else:
        chosen = choose_interfaces(layout.host, layout.port)
        print_note(
            f"node {layout.node} of {layout.nodes} on {socket.gethostname()}, {counted(layout.nproc, 'rank')}, {chosen}"
        )
    os.environ.pop(SECRET, None)  # no rank needs it
    preload_ranks()


def warnings(case: Case, sources: Mapping[str, str], options: argparse.Namespace) -> tuple[str, ...]:
    """Warnings for the reader of the case's report, in the launch that `options` request."""
    found = check_case(case, _local_ranks(options))
    unused = (*unused_variables(os.environ, case, sources), *unused_keys(case, sources))
    missed = near_misses(os.environ) if program_of(case.profile) == "sglang" else ()
    return (*missed, *epv2_notes(os.environ, case), *unused, *found)


def _local_ranks(options: argparse.Namespace) -> int | None:
    """Ranks of the launch on each node; None where all are on this one."""
    if world_size() is not None:
        return int(os.environ["LOCAL_WORLD_SIZE"])
    layout = layout_of(options)
    return None if layout is None else layout.nproc


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
        by_profile = dict.fromkeys(note for entry in entries for note in entry.warnings)
        for note in filter(None, (*by_profile, note_of_launch(os.environ, found), note_of_keys(found))):
            print_note(note)
    return found


def _examined(entry: Entry, origin: str, check: Callable[[Entry], tuple[str, ...]]) -> Entry:
    if entry.expect == BY_KERNEL:
        verdict = Verdict.NONDETERMINISTIC if adds_atomically(entry.case) else Verdict.PASS
        entry = msgspec.structs.replace(entry, expect=verdict.value)
    try:
        return msgspec.structs.replace(entry, warnings=(*entry.warnings, *check(entry)))
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


class Bench(msgspec.Struct, frozen=True):
    """The entries of a launch whose folder and devices are held, and the other nodes."""

    entries: Sequence[Entry]
    options: argparse.Namespace
    nodes: Nodes

    def run(self, progress: Progress, rules: Rules = _ONE_FAULT, report_paths: tuple[str, ...] = ()) -> Summary:
        """Run the entries to their end, with as many launches as needed, or until the deadline of `rules`."""
        out, bundle = Path(self.options.out), self.options.bundle
        try:
            prepare_ranks(layout_of(self.options))
            return Campaign(self.entries, out, rules, progress, bundle, self.nodes.leader).run(report_paths)
        finally:
            progress.close()


@contextlib.contextmanager
def hold_bench(entries: Sequence[Entry], options: argparse.Namespace, forget: Callable[[], None]) -> Iterator[Bench]:
    """Hold the folder and devices of a launch, let the other nodes join, and `forget` the results that it replaces.

    Raises:
        Busy: another bench holds the folder or a device.
        InvalidCase: `forget` refuses to replace what the folder holds, or the other nodes cannot join.
        Unsupported: this machine lacks devices, memory or other resources.

    """
    devices = check_launch(entries, nodes_of(options))
    with hold(Path(options.out), devices, options.lock_timeout), other_nodes(options) as nodes:
        check_device_memory(entries, devices)
        forget()
        yield Bench(entries, options, nodes)


def run_corpus(
    entries: Sequence[Entry], options: argparse.Namespace, forget: Callable[[], None], written: Iterable[str]
) -> None:
    """Run all entries, however many lose their ranks; the caller judges their results, and writes to `written`.

    Raises:
        InvalidCase: a path that cannot be written, or as `hold_bench`, which raises Busy and Unsupported too.

    """
    for path in filter(None, (options.out, *written)):
        check_path(path)
    check_folder(options.out, report_bytes(entry.case for entry in entries))
    check_bundle(options)
    tell_task()
    with hold_bench(entries, options, forget) as bench:
        progress = Progress(len(entries), what=entries[0].suite.rpartition(" ")[2], each=False, expected=False)
        bench.run(progress, Rules(max_faults=len(entries) + 1))


@contextlib.contextmanager
def hold_lab(options: argparse.Namespace) -> Iterator[Lab]:
    """Hold the folder of a command that runs variants of a case, and begin to import torch for their ranks.

    Raises:
        Busy: another bench holds the folder.
        InvalidCase: the folder holds other results.

    """
    out = Path(options.out)
    with hold(out, (), options.lock_timeout):
        prepare_ranks()
        with Lab(out) as lab:
            yield lab


def take_part(  # noqa: PLR0913 - the results, their formats, and the part of a baseline to compare them with
    job: Job,
    options: argparse.Namespace,
    forget: Callable[[], None],
    results: Results,
    writers: Mapping[Path, Writer],
    keep: Callable[[str], bool] | None = None,
) -> int:
    """Run the job as one of the ranks that torchrun started; rank 0 forgets, exports and compares results.

    `keep` is as in `judge_baseline`.
    """
    with hold_as_rank(job, options.lock_timeout):
        if not is_rank_0():
            return work(job)
        baseline = read_baseline(options)
        forget()
        with exported(results, writers):
            code = work(job)
    return judge_baseline(options, baseline, results, code, keep)
