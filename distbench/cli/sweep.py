"""`distbench sweep`: one case at many limits, as one table."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from distbench.case.entry import Entry
from distbench.case.spec import Case, case_hash
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
from distbench.report.progress import Progress

if TYPE_CHECKING:
    from distbench.experts.selection.releases import BucketRules
    from distbench.report.sweep import SweepRow

_SUITE, _LIMIT = "distbench sweep", "limit="
_SWEEP = "sweep.json"
_BOUNDS = ("max-recv", "sum", "sum32", "pow2", "capacity")
_ITERATIONS = 50
_AUTO = "auto"


def add(commands: Any) -> None:
    """Add the command to the parser."""
    sweep = commands.add_parser(
        "sweep",
        description="Run one case without a limit, then at each of --limits, in one launch; sweep.json in --out has "
        "the table too. The same command with the same --out resumes where it was stopped.",
    )
    sweep.set_defaults(command=_sweep, resumes=True)
    sweep.add_argument(
        "--limits",
        metavar="auto|ROWS,…",
        default=_AUTO,
        help="limits; auto: the rows really received, each edge of a kernel bucket above the least that some rank must "
        "receive, and each proven bound (default: %(default)s)",
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
    from distbench.report.journal import unfinished
    from distbench.report.results import Results
    from distbench.report.sweep import COLUMNS, read_rows

    entries = _entries(options)
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
    print_sweep([row.cells() for row in rows], COLUMNS, _notes(rows, out))
    return summary.exit_code


def _refuse_strangers(out: Path) -> None:
    from distbench.report.journal import refuse_strangers

    refuse_strangers(out, _SUITE, lambda name: name.startswith(_LIMIT))


def _notes(rows: list[SweepRow], out: Path) -> list[str]:
    from distbench.report.journal import RESULTS

    notes = sorted({note for row in rows for note in row.notes})
    proofs = {row.proof.bound: row.proof.formula for row in rows if row.proof is not None}
    notes += [
        f"proven: loses no row under any routing of these token counts, at most {bound} rows a rank ({formula}); "
        "this batch: loses none under this routing, others may; unsafe: loses rows of this batch"
        for bound, formula in proofs.items()
    ]
    return [*notes, f"results in {out / _SWEEP} and {out / RESULTS}"]


def _entries(options: argparse.Namespace) -> tuple[Entry, ...]:
    from distbench.case.environment import read_environment
    from distbench.case.resolve import Layer, load_case_file, resolve_case
    from distbench.cli.launching import warnings

    files = [load_case_file(options.case)] if options.case else []
    timed = Layer("sweep", {"iterations": _ITERATIONS})
    given = [*case_flags(options), *files, timed]
    layers = [*given, *read_environment(os.environ, given)]
    resolved = resolve_case([Layer("sweep", {"limit": "off"}), *layers], num_ranks(options))
    base = resolved.case
    entries: dict[str, Entry] = {}
    notes = (*resolved.notes, *warnings(base, resolved.sources, options))
    for limit in sweep_limits(base, options.limits):
        resolved = resolve_case([Layer("sweep", {"limit": limit}), *layers], num_ranks(options))
        entry = Entry(
            name=f"{_LIMIT}{limit}", case=resolved.case, sources=resolved.sources, suite=_SUITE, warnings=notes
        )
        entries.setdefault(case_hash(resolved.case), entry)
    return tuple(entries.values())


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
