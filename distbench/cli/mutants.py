"""`distbench mutants`: share of a corpus of broken kernels, transports, cuts and combines that the bench detects."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from distbench.case.spec import CALL_KEYS, CALLER_KEYS, FIELD_HINTS
from distbench.cli.argument_types import share, whole
from distbench.cli.options import add_case_options, add_launch, add_voice, case_flags, output_of
from distbench.report.terminal import print_step, print_table, print_text, print_verdict

if TYPE_CHECKING:
    from distbench.faults.mutants.corpus import Mutant

_SEEDS = 1
# Keys that the command itself sets: the mutant, its arm, and the inputs.
_OWN_KEYS = (
    *("inject", "numerics", "require", "seed", "limit", "policy", "dispatch_dtype", "combine_quant"),
    *CALLER_KEYS,
    *CALL_KEYS,
)
_MARK = "<!-- distbench mutants writes what follows -->\n"


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "mutants",
        description="Exit code 1 where less than the required share is detected in every run, or where an equivalent "
        "mutant or a run without one alarms. Options of the case hold for all cases.",
    )
    command.set_defaults(command=_mutants, resumes="the same command with --resume goes on")
    add_launch(command)
    add_voice(command)
    command.add_argument("--only", metavar="NAME,…", default="", help="only these mutants, or the mutants of a class")
    command.add_argument("--seeds", type=whole(1), default=_SEEDS, metavar="SEEDS", help="seeds (default: %(default)s)")
    command.add_argument(
        "--arms", choices=("all", "truncated"), help="only mutants of all arms alike, or of truncated (default: both)"
    )
    command.add_argument(
        "--share",
        type=share,
        default=None,
        metavar="SHARE",
        help="share of mutants that must be detected (default: 0.97)",
    )
    command.add_argument("--resume", action="store_true", help="keep the results of an interrupted run")
    output_of(command).add_argument("--json", metavar="PATH", default="", help="write the results there, as JSON")
    output_of(command).add_argument(
        "--write-docs", metavar="PATH", default="", help="write the tables there, like docs/mutants.md"
    )
    command.add_argument(
        "--list", action="store_true", help="list the mutants and what they stand for, and run nothing"
    )
    add_case_options(command, [key for key in FIELD_HINTS if key not in _OWN_KEYS])


def _mutants(options: argparse.Namespace) -> int:
    print_step("mutants: planning the runs")  # what follows loads torch
    from distbench.cli.launching import run_corpus
    from distbench.report.files import write_atomically
    from distbench.report.journal import refuse_others, replace_results
    from distbench.tools.mutants.outcomes import SHARE, found_in
    from distbench.tools.mutants.plan import ARMS, RANKS, SUITE, choose, plan
    from distbench.tools.mutants.table import COLUMNS, cells, closing_lines, markdown

    only = [name.strip() for name in options.only.split(",") if name.strip()]
    if options.list:
        print_table(
            [_listed(mutant) for mutant in choose(only)], ("mutant", "class", "seam", "what it does", "stands for")
        )
        return 0
    ranks = RANKS if options.nproc is None else options.nproc
    arms = (options.arms,) if options.arms else tuple(ARMS)
    asked = plan(ranks, options.seeds, only, case_flags(options), arms)
    entries = [run.entry for run in asked.runs]
    out = Path(options.out)

    def forget() -> None:
        (refuse_others if options.resume else replace_results)(out, SUITE, lambda _: False)

    run_corpus(entries, options, forget, (options.json, options.write_docs))
    found = found_in(out, asked, ranks, options.seeds, SHARE if options.share is None else options.share)
    if not options.quiet:
        print_table(cells(found), COLUMNS)
    *lines, ending = closing_lines(found)
    print_text(*lines)
    print_verdict(ending, 0 if found.passed else 1)
    if options.json:
        write_atomically(Path(options.json), msgspec.json.format(msgspec.json.encode(found)) + b"\n")
    if options.write_docs:
        _write_docs(Path(options.write_docs), markdown(found, _command(options, ranks)))
    return 0 if found.passed else 1


def _listed(mutant: Mutant) -> tuple[str, ...]:
    note = "equivalent: " + mutant.equivalent if mutant.equivalent else mutant.bug
    return mutant.name, mutant.kind, mutant.seams[0], mutant.text, note


def _write_docs(path: Path, tables: str) -> None:
    """Replace the tables in the file, behind the line that marks them; earlier text stays."""
    from distbench.report.files import write_atomically

    head = path.read_text(encoding="utf-8").partition(_MARK)[0] if path.exists() else "# Mutants\n\n"
    write_atomically(path, (head + _MARK + "\n" + tables).encode())


def _command(options: argparse.Namespace, ranks: int) -> str:
    """Command that regenerates the tables."""
    flags = [
        f"--{key.replace('_', '-')} {value}" for layer in case_flags(options) for key, value in layer.values.items()
    ]
    flags += [f"--{name} {value}" for name in ("only", "arms") if (value := getattr(options, name))]
    return " ".join([f"distbench mutants --nproc {ranks} --seeds {options.seeds}", *flags, "--write-docs PATH"])
