"""`distbench faults`: the faults that a case can inject."""

from __future__ import annotations

import argparse
from typing import Any

from distbench.errors import InvalidCase
from distbench.faults.catalogue import Listed, listed_faults
from distbench.report.terminal import print_table, print_text
from distbench.utils.text import closest

_RANKS = 8


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "faults",
        description="List the faults that --inject and the key inject take; with a NAME, its options. "
        "`distbench mutants --list` has the broken kernels, which --inject takes as mutant:name=NAME.",
    )
    command.add_argument("name", metavar="NAME", nargs="?", help="a fault")
    command.set_defaults(command=_faults)


def _faults(options: argparse.Namespace) -> int:
    known = {fault.name: fault for fault in listed_faults()}
    if options.name is None:
        print_table([(fault.name, fault.stage or "any", fault.text) for fault in known.values()], _COLUMNS)
        print_text("distbench faults NAME has the options of one")
        return 0
    if options.name not in known:
        message = f"no fault {options.name!r:.40}{closest(options.name, known)}; see `distbench faults`"
        raise InvalidCase(message)
    return _show(known[options.name])


_COLUMNS = ("fault", "stage", "what goes wrong")


def _show(fault: Listed) -> int:
    """Print one fault with its options."""
    print_text(f"{fault.name}: {fault.text}", f"stands for: {fault.bug}")
    from distbench.faults.injector import FAULTS  # loads torch

    kind = FAULTS[fault.name]
    print_text(f"needs: {kind.needs}")
    rows = [
        (key, "any" if option.default == "" else str(option.default), option.allowed)
        for key, option in kind.all_options(_RANKS).items()
    ]
    print_table(rows, ("option", "default", f"allowed, with {_RANKS} ranks"))
    print_text(f"distbench run --inject {fault.name}:{rows[0][0]}={rows[0][1]}")
    return 0
