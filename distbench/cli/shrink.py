"""`distbench shrink`: the smallest case with the same failure."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from distbench.case.spec import UNSTORED_KEYS, Case, names_code
from distbench.cli.launcher_tasks import tell_task
from distbench.cli.options import add_case_options, add_folder, add_ranks, add_voice, known_report, one_case
from distbench.cli.torchrun_rank import alone
from distbench.report.terminal import print_step, print_table, print_text
from distbench.utils.text import counted

if TYPE_CHECKING:
    from distbench.tools.lab import Lab
    from distbench.tools.shrink import Shrunk, Step

_SHRUNK = "shrunk.json"


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "shrink",
        description="Find the smallest case with the same verdict, first wrong stage and cause, and write it as a case "
        f"file, {_SHRUNK} in --out.",
    )
    command.set_defaults(command=_shrink)
    command.add_argument("case", metavar="CASE|REPORT", help="case file or report.json")
    add_ranks(command, "ranks, where the case does not say (default: 8)")
    add_folder(command)
    add_voice(command)
    add_case_options(command)


def _shrink(options: argparse.Namespace) -> int:
    from distbench.cli.launching import hold_lab
    from distbench.report.files import write_atomically
    from distbench.tools.shrink import shrink

    alone("shrink")
    tell_task()
    case = one_case(options.case, options)
    known = known_report(options.case, options)
    out = Path(options.out)
    with hold_lab(options) as lab:
        lab.work = "shrink: the case as given"
        found = shrink(lab, case, _tell(lab), known)
        values = {key: value for key, value in msgspec.structs.asdict(found.case).items() if key not in UNSTORED_KEYS}
        write_atomically(out / _SHRUNK, msgspec.json.format(msgspec.json.encode(values), indent=2) + b"\n")
    if not options.quiet:
        _print(case, found)
    print_text(f"{found.same}: {out / _SHRUNK}; distbench run --case {out / _SHRUNK}{code_flags(found.case)}")
    return 0


def code_flags(case: Case) -> str:
    """Flags that name code of other packages, which no case file may name alone; each after a blank."""
    named = {key: value for key, value in msgspec.structs.asdict(case).items() if names_code(key, value)}
    return "".join(f" --{key.replace('_', '-')} {shlex.quote(str(value))}" for key, value in named.items())


def _tell(lab: Lab) -> Callable[[Step], None]:
    """Printer of the steps on standard error."""

    def tell(step: Step) -> None:
        case = step.case
        size = f"{counted(case.ep_size, 'rank')}, {counted(sum(case.tokens), 'token')}"
        layer = f"{counted(case.num_experts, 'expert')}, H{case.hidden_size} I{case.intermediate_size}"
        text = f"{size}, top-{case.topk}, {layer}"
        lab.work = f"shrink: below {size}"
        print_step(f"shrink: {step.what}: {text} ({counted(step.cases, 'case')}, {counted(step.launches, 'launch')})")

    return tell


def _print(case: Case, found: Shrunk) -> None:
    from distbench.case.suite import value_text

    before, after = (msgspec.structs.asdict(one) for one in (case, found.case))
    rows = [(key, value_text(before[key]), value_text(after[key])) for key in after if before[key] != after[key]]
    rows.insert(0, ("tokens in all", str(sum(case.tokens)), str(sum(found.case.tokens))))
    print_table(rows, ("key", "given", "smallest"))
