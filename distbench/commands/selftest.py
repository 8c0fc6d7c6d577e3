"""`distbench selftest`: would the bench have noticed?"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path
from typing import Any

from distbench.commands.numbers import whole
from distbench.commands.options import add_launch, campaign
from distbench.errors import InvalidCase
from distbench.locks import hold
from distbench.preflight import check_folder, check_memory, check_path
from distbench.progress import Progress
from distbench.report.console import print_line, print_table
from distbench.report.files import write_atomically
from distbench.report.journal import RESULTS, refuse_others
from distbench.room import report_bytes

_RANKS, _SEEDS, _CLEAN = 4, 20, 1000
_QUICK_SEEDS, _QUICK_CLEAN = 1, 50


def add(commands: Any) -> None:
    """Describe the command."""
    command = commands.add_parser(
        "selftest",
        help="inject every known fault, and run random clean cases: would the bench have noticed?",
        description="Exit code 1 where a fault slips through, a healthy rank is blamed, or a clean case is no PASS.",
    )
    command.set_defaults(command=_selftest)
    add_launch(command)
    command.add_argument("--quick", action="store_true", help="every fault once, fifty clean cases")
    command.add_argument("--seeds", type=whole(1), metavar="N", help=f"random cases for each fault (default: {_SEEDS})")
    command.add_argument(
        "--clean", type=whole(0), metavar="N", help=f"random cases without a fault (default: {_CLEAN})"
    )
    command.add_argument("--faults", metavar="TEXT", default="", help="only faults with this in their names")
    command.add_argument("--markdown", metavar="PATH", default="", help="write the table there, as docs/selftest.md is")
    command.add_argument("--list", action="store_true", help="list the faults and what they stand for, and run nothing")


def _selftest(options: argparse.Namespace) -> int:
    from distbench.faults.injector import FAULTS  # noqa: PLC0415 - loads torch, which other commands do without
    from distbench.selftest.outcomes import outcomes  # noqa: PLC0415
    from distbench.selftest.table import COLUMNS, cells, closing_lines, markdown  # noqa: PLC0415
    from distbench.selftest.trials import CLEAN, trials  # noqa: PLC0415

    if options.list:
        rows = [(name, kind.stage, (kind.__doc__ or "").strip(), kind.bug) for name, kind in FAULTS.items()]
        print_table(rows, ("fault", "stage", "what goes wrong", "stands for"))
        return 0
    ranks = _RANKS if options.nproc is None else options.nproc
    seeds, clean = _counts(options, ranks)
    asked = [one for one in trials(ranks, seeds, clean) if options.faults in one.label or not one.label]
    out = Path(options.out)
    for path in filter(None, (options.out, options.markdown)):
        check_path(path)
    check_folder(options.out, report_bytes(one.entry.case for one in asked))
    check_memory(one.entry for one in asked)
    options.max_faults = len(asked) + 1
    with hold(out, (), options.lock_timeout):
        refuse_others(out, lambda name: re.split("[: ]", name)[0] in {*FAULTS, CLEAN})
        (out / RESULTS).unlink(missing_ok=True)
        campaign([one.entry for one in asked], options, Progress(len(asked), quiet=not sys.stderr.isatty()))
    found = outcomes(asked, out)
    print_table(cells(found), COLUMNS)
    for line in closing_lines(found):
        print_line(line)
    if options.markdown:
        command = f"distbench selftest --nproc {ranks} --seeds {seeds} --clean {clean} --markdown PATH"
        write_atomically(Path(options.markdown), markdown(found, command).encode())
    return 0 if found.passed else 1


def _counts(options: argparse.Namespace, ranks: int) -> tuple[int, int]:
    default = (_QUICK_SEEDS, _QUICK_CLEAN) if options.quick else (_SEEDS, _CLEAN)
    seeds = default[0] if options.seeds is None else options.seeds
    clean = default[1] if options.clean is None else options.clean
    if ranks < 2:  # noqa: PLR2004 - one rank has no peer
        message = f"selftest --nproc {ranks}: one rank has no peer; start two or more"
        raise InvalidCase(message)
    return seeds, clean
