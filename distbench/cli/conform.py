"""`distbench conform`: the rules that a transport and experts have to keep, a case each."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

from distbench.case.spec import FIELD_HINTS
from distbench.cli.options import add_case_options, add_launch, add_voice, case_flags
from distbench.cli.torchrun_rank import alone
from distbench.report.terminal import print_table, print_text, print_verdict
from distbench.utils.text import counted

_RANKS = 8
_KEYS = (
    *("transport", "transport_option", "experts", "experts_option", "emulate", "device", "seed", "graph"),
    *("timeout", "stage_timeouts", "jitter"),
)


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "conform",
        description="Run a case for each rule of docs/conformance.md, and list which are held. Exit code 1 where a "
        "rule is broken, 3 where ranks are lost; what a plugin states not to support is not asked for.",
    )
    command.set_defaults(command=_conform)
    add_launch(command)
    add_voice(command)
    add_case_options(command, [key for key in FIELD_HINTS if key in _KEYS])


def _conform(options: argparse.Namespace) -> int:
    from distbench.case.environment import reader
    from distbench.case.suite import load_suite
    from distbench.cli.launching import examined, run_corpus
    from distbench.report.journal import read_reports, replace_results
    from distbench.report.schema import parts_label
    from distbench.testing.conformance import RULES, SUITE, exit_code, judge, with_merged

    alone("conform")
    ranks = options.nproc or _RANKS
    suite = load_suite(SUITE, ranks, case_flags(options), reader(os.environ))
    entries = examined(suite.entries, suite.origin, options)
    out = Path(options.out)
    run_corpus(entries, options, lambda: replace_results(out, SUITE, RULES.__contains__), [])
    reports = with_merged(read_reports(out), suite.merged)
    case, held, code = entries[0].case, judge(reports), exit_code(reports)
    print_text(
        f"{case.transport} + {case.experts}{parts_label(case.plugins, case.stand_ins)}, {counted(ranks, 'rank')}"
    )
    if not options.quiet:
        print_table([tuple(one) for one in held], ("rule", "held", "what is held, or the first evidence"))
    answers = ", ".join(
        f"{sum(one.held == word for one in held)} {word}" for word in dict.fromkeys(one.held for one in held)
    )
    print_verdict(f"{counted(len(held), 'rule')}: {answers}; exit {code}, results in {out}/results.jsonl", code)
    return code
