"""`distbench selftest`: check that every known fault is detected."""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from distbench.case.spec import CALLER_KEYS, FIELD_HINTS
from distbench.cli.argument_types import whole
from distbench.cli.options import add_case_options, add_launch, add_voice, case_flags, output_of
from distbench.errors import InvalidCase
from distbench.report.terminal import Grid, folded, print_parts, print_step, print_table, print_text, print_verdict
from distbench.utils.voice import Voice, voice

if TYPE_CHECKING:
    from distbench.tools.selftest.cases import FaultPlan
    from distbench.tools.selftest.outcomes import Outcomes

_RANKS, _SEEDS, _CLEAN = 4, 20, 1000
_QUICK_SEEDS, _QUICK_CLEAN = 1, 50
# Keys that the self-test itself sets: the fault, and the rules of judgement.
_OWN_KEYS = ("inject", "numerics", "require", *CALLER_KEYS)


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "selftest",
        description="Exit code 1 where a fault is missed, a healthy rank is blamed, or a clean case is no PASS. "
        "Options of the case hold for all cases, except where a fault needs another value.",
    )
    command.set_defaults(command=_selftest, resumes="the same command with --resume goes on")
    add_launch(command)
    add_voice(command)
    command.add_argument("--quick", action="store_true", help="every fault once, fifty clean cases")
    command.add_argument(
        "--seeds", type=whole(1), metavar="CASES", help=f"random cases for each fault (default: {_SEEDS})"
    )
    command.add_argument(
        "--clean", type=whole(0), metavar="CASES", help=f"random cases without a fault (default: {_CLEAN})"
    )
    command.add_argument(
        "--faults",
        metavar="TEXT,…",
        default="",
        help="only faults with one of these in their names; also faults of plugins, by their whole names",
    )
    command.add_argument("--resume", action="store_true", help="keep the results of an interrupted run")
    output_of(command).add_argument(
        "--markdown", metavar="PATH", default="", help="write the table there, like docs/selftest.md"
    )
    command.add_argument("--list", action="store_true", help="list the faults and what they stand for, and run nothing")
    add_case_options(command, [key for key in FIELD_HINTS if key not in _OWN_KEYS])


def _selftest(options: argparse.Namespace) -> int:
    print_step("selftest: planning the cases")  # what follows loads torch
    from distbench.case.injection import is_brought
    from distbench.cli.launching import run_corpus
    from distbench.faults.injector import FAULTS
    from distbench.report.files import write_atomically
    from distbench.report.journal import refuse_others, replace_results
    from distbench.tools.selftest.cases import CLEAN, SUITE, plan
    from distbench.tools.selftest.outcomes import outcomes
    from distbench.tools.selftest.table import markdown

    if options.list:
        rows = [(name, kind.stage, (kind.__doc__ or "").strip(), kind.bug) for name, kind in FAULTS.items()]
        print_table(rows, ("fault", "stage", "what goes wrong", "stands for"))
        return 0
    ranks = _RANKS if options.nproc is None else options.nproc
    seeds, clean = _counts(options, ranks)
    brought = [name for name in map(str.strip, options.faults.split(",")) if is_brought(name)]
    every = plan(ranks, seeds, clean, case_flags(options), brought)
    asked = _chosen(every, options.faults)
    entries = [one.entry for one in asked.trials]
    out = Path(options.out)

    def forget() -> None:
        keep = refuse_others if options.resume else replace_results
        own = {*FAULTS, CLEAN}
        keep(out, SUITE, lambda name: re.split("[: ]", name)[0] in own or name.split(" ")[0] in brought)

    run_corpus(entries, options, forget, [options.markdown])
    found = outcomes(asked, out)
    print_outcomes(found)
    if options.markdown:
        write_atomically(Path(options.markdown), markdown(found, _command(options, ranks, seeds, clean)).encode())
    return 0 if found.passed else 1


def print_outcomes(found: Outcomes) -> None:
    """Print the table of faults, unless the command is quiet, and the result last."""
    from distbench.tools.selftest.table import COLUMNS, cells, closing_lines, ran

    print_text(f"self-test of {ran(found)}")
    if voice() is not Voice.QUIET:
        print_parts(folded(Grid(COLUMNS, cells(found)), ("caught", "right")))
    *lines, ending = closing_lines(found)
    print_text(*lines)
    print_verdict(ending, 0 if found.passed else 1)


def _chosen(every: FaultPlan, text: str) -> FaultPlan:
    """The clean cases, and the faults that `text` names.

    Raises:
        InvalidCase: no fault has such a name.

    """
    wanted = [name.strip() for name in text.split(",") if name.strip()]
    labels = dict.fromkeys([*(one.label for one in every.trials if one.label), *every.impossible])
    unknown = [name for name in wanted if not any(name in label for label in labels)]
    if unknown:
        message = f"--faults {unknown[0]!r:.40}: in no fault's name; allowed are parts of {', '.join(labels)}"
        raise InvalidCase(message)
    chosen = {label for label in labels if not wanted or any(name in label for name in wanted)}
    impossible = {label: reason for label, reason in every.impossible.items() if label in chosen}
    trials = [one for one in every.trials if not one.label or one.label in chosen]
    return msgspec.structs.replace(every, trials=trials, impossible=impossible)


def _command(options: argparse.Namespace, ranks: int, seeds: int, clean: int) -> str:
    """Command that regenerates the table."""
    flags = [
        f"--{key.replace('_', '-')}={value}" for layer in case_flags(options) for key, value in layer.values.items()
    ]
    flags += [f"--faults={options.faults}"] if options.faults else []
    numbers = f"--nproc {ranks} --seeds {seeds} --clean {clean}"
    return " ".join(["distbench selftest", numbers, *flags, "--markdown PATH"])


def _counts(options: argparse.Namespace, ranks: int) -> tuple[int, int]:
    default = (_QUICK_SEEDS, _QUICK_CLEAN) if options.quick else (_SEEDS, _CLEAN)
    seeds = default[0] if options.seeds is None else options.seeds
    clean = default[1] if options.clean is None else options.clean
    if ranks < 2:  # noqa: PLR2004 - one rank has no peer
        message = f"selftest --nproc {ranks}: one rank has no peer; start two or more"
        raise InvalidCase(message)
    return seeds, clean
