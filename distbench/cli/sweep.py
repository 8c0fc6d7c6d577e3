"""`distbench sweep`: one case at many limits, as one table."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from distbench.case.entry import Entry
from distbench.case.identity import case_hash
from distbench.case.spec import Case
from distbench.cli.argument_types import plain_counts
from distbench.cli.launcher_tasks import tell_task
from distbench.cli.options import (
    add_case_options,
    add_launch,
    add_report,
    add_voice,
    case_flags,
    check_bundle,
    num_ranks,
    report_writers,
)
from distbench.cli.torchrun_rank import hold_as_rank, is_rank_0, work, world_size
from distbench.errors import InvalidCase, exit_meaning
from distbench.report.progress import Progress
from distbench.report.terminal import print_step, print_verdict
from distbench.utils.text import counted

if TYPE_CHECKING:
    from distbench.experts.selection.releases import BucketRules
    from distbench.report.sweep import SweepRow

_SUITE, _LIMIT, _TOKENS = "distbench sweep", "limit=", "tokens="
_SWEEP = "sweep.json"
_BOUNDS = ("max-recv", "sum", "sum32", "pow2", "capacity")
_ITERATIONS = 50
_AUTO = "auto"


def add(commands: Any) -> None:
    """Add the command to the parser."""
    sweep = commands.add_parser(
        "sweep",
        description="Run one case without a limit, then at each of --limits, for each of --sizes; the table is in "
        "sweep.json too. The same command resumes where it was stopped.",
    )
    sweep.set_defaults(command=_sweep, resumes="the same command resumes")
    sweep.add_argument(
        "--sizes",
        metavar="TOKENS,…",
        default="",
        help="tokens of each rank in turn: 1,16,4k or ranges as 1:4k:*2, 64:512:+64 (--tokens takes a range too)",
    )
    sweep.add_argument(
        "--limits",
        metavar="ROWS,…",
        default="",
        help="limits; auto: the rows received, each edge of a kernel bucket above the least that some rank must "
        "receive, each proven bound (default: auto, with sizes the case's)",
    )
    sweep.add_argument("--case", metavar="FILE", help="case file, .toml or .json")
    add_launch(sweep)
    add_report(sweep)
    add_voice(sweep)
    add_case_options(sweep)


def _sweep(options: argparse.Namespace) -> int:
    from distbench.cli.launching import exported, hold_bench
    from distbench.launcher.job import Job
    from distbench.launcher.preflight import check_folder, check_path
    from distbench.launcher.resources import report_bytes
    from distbench.report.console import print_sweep
    from distbench.report.files import write_atomically
    from distbench.report.journal import RESULTS, unfinished
    from distbench.report.results import Results
    from distbench.report.sweep import COLUMNS, read_rows

    entries = sweep_entries(options)
    check_path(options.out)
    check_folder(options.out)
    check_folder(options.out, report_bytes(entry.case for entry in unfinished(Path(options.out), entries)))
    check_bundle(options)
    writers = report_writers(options, Path(options.out))
    results = Results(options.out, {case_hash(entry.case) for entry in entries}.__contains__)
    started = world_size()
    if started is not None:
        job = Job(entries=entries, out=options.out, bundle=options.bundle, supervised=False, started=started)
        with hold_as_rank(job, options.lock_timeout):
            if is_rank_0():
                _refuse_strangers(Path(options.out))
                with exported(results, writers):
                    return work(job)
            return work(job)
    tell_task()
    out = Path(options.out)
    with hold_bench(entries, options, lambda: _refuse_strangers(out)) as bench:
        with exported(results, writers):
            summary = bench.run(Progress(len(entries), what="sweep"))
        rows = read_rows(out, [case_hash(entry.case) for entry in entries])
        write_atomically(out / _SWEEP, msgspec.json.format(msgspec.json.encode(rows), indent=2) + b"\n")
    print_sweep([row.cells() for row in rows], COLUMNS, proof_notes(rows))
    ending = f"exit {summary.exit_code}, {exit_meaning(summary.exit_code)}"
    print_verdict(f"{ending}: results in {out / _SWEEP} and {out / RESULTS}", summary.exit_code)
    return summary.exit_code


def _refuse_strangers(out: Path) -> None:
    from distbench.report.journal import refuse_strangers

    refuse_strangers(out, _SUITE, lambda name: name.startswith((_LIMIT, _TOKENS)))


def proof_notes(rows: list[SweepRow]) -> list[str]:
    """Notes to the figures of a sweep: the clock, and what `safe` means."""
    notes = sorted({note for row in rows for note in row.notes})
    proofs = {row.proof.bound: row.proof.formula for row in rows if row.proof is not None}
    if not proofs:
        return notes
    known = [f", at most {counted(bound, 'row')} a rank ({formula})" for bound, formula in proofs.items()]
    bound = known[0] if len(known) == 1 else ""
    notes.append(
        f"proven: loses no row under any routing of these token counts{bound}; this batch: loses none under this "
        "routing, others may; unsafe: loses rows of this batch"
    )
    return notes


def sweep_entries(options: argparse.Namespace) -> tuple[Entry, ...]:
    """The cases of a sweep: for each size the limits, each case once."""
    from distbench.case.environment import read_environment
    from distbench.case.resolve import Layer, load_case_file, resolve_case

    sizes = _sizes(options)
    files = [load_case_file(options.case)] if options.case else []
    timed = Layer("sweep", {"iterations": _ITERATIONS})
    given = [*case_flags(options), *files, timed]
    layers = [*given, *read_environment(os.environ, given)]
    if world_size() is None or is_rank_0():
        print_step(f"sweep: {counted(len(sizes) or 1, 'size')}, results in {options.out}")
    from distbench.cli.launching import warnings

    entries: dict[str, Entry] = {}
    for size in sizes or (None,):
        own = {} if size is None else {"tokens": size}
        resolved = resolve_case([Layer("sweep", own), *layers], num_ranks(options))
        most = resolved.case.max_dispatch_tokens_per_rank
        if size is not None and size > most:
            message = (
                f"size {size}: a sender may hold {counted(most, 'token')}; give --max-dispatch-tokens-per-rank {size}"
            )
            raise InvalidCase(message)
        asked = options.limits or (_AUTO if size is None else resolved.case.limit)
        base = resolve_case([Layer("sweep", own | {"limit": "off"}), *layers], num_ranks(options)).case
        notes = (*resolved.notes, *warnings(base, resolved.sources, options))
        for limit in sweep_limits(base, asked):
            resolved = resolve_case([Layer("sweep", own | {"limit": limit}), *layers], num_ranks(options))
            name = f"{_LIMIT}{limit}" if size is None else f"{_TOKENS}{size}/{_LIMIT}{limit}"
            entry = Entry(name=name, case=resolved.case, sources=resolved.sources, suite=_SUITE, warnings=notes)
            entries.setdefault(case_hash(resolved.case), entry)
    return tuple(entries.values())


def _sizes(options: argparse.Namespace) -> tuple[int, ...]:
    """Tokens of each rank to sweep, of --sizes, or of --tokens where it has a range; empty for none."""
    from distbench.case.tokens import parse_sizes

    tokens = options.case_tokens or ""
    if not options.sizes and ":" not in tokens:
        return ()
    if options.sizes and tokens:
        message = f"--sizes {options.sizes:.40} --tokens {tokens:.40}: both say what the ranks have; give one"
        raise InvalidCase(message)
    options.case_tokens = None
    return parse_sizes(plain_counts(options.sizes or tokens))


def sweep_limits(case: Case, asked: str) -> list[str]:
    """Limits of a sweep in order, the padded buffer first.

    `auto` leaves out edges below ceil(tokens / W): some rank receives at least that many rows.
    """
    from distbench.case.limits import parse_limit
    from distbench.experts.selection.choice import CURRENT, rules_for

    if asked != _AUTO:
        return ["off", *(parse_limit(limit) for limit in plain_counts(asked).split(","))]
    least = -(-sum(case.tokens) // case.ep_size)
    rules = rules_for(case.aiter_version) if case.aiter_version else CURRENT
    edges = [rows for rows in bucket_edges(rules, case.capacity) if rows >= least]
    return ["off", "max-recv", *map(str, edges), *_BOUNDS[1:]]


def bucket_edges(rules: BucketRules, capacity: int) -> list[int]:
    """Row counts up to `capacity` that end a bucket, which is named by them."""
    from distbench.experts.selection.releases import padded_rows

    powers = [1 << exponent for exponent in range(capacity.bit_length())]
    candidates = sorted({*powers, *rules.tiers})
    return [rows for rows in candidates if rows <= capacity and padded_rows(rows, rules) == rows]
