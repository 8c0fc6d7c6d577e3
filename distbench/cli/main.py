"""The command line: parse, dispatch, and map every ending to an exit code."""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import time
from collections.abc import Sequence
from importlib import import_module

from distbench import __version__
from distbench.cli.parser import Parser
from distbench.errors import DiskFull, DistbenchError, InvalidCase, ResultsLost, Unsupported, is_disk_full
from distbench.report.progress import Meter
from distbench.utils.signals import Interrupted, end_with_stdin
from distbench.utils.streams import open_nowhere, speak_any_encoding
from distbench.utils.text import closest
from distbench.utils.voice import Voice, set_voice

COMMANDS = {
    "Run": {
        "run": "run one case: padded against truncated, bit for bit",
        "suite": "run many cases in one launch",
        "sweep": "one case at many limits: time, kernel, memory and verdict of each",
        "conform": "check a transport and experts against the rules that they have to keep",
        "selftest": "check that the bench detects every known fault, and passes random clean cases",
        "mutants": "run a corpus of broken kernels, transports, cuts and combines: which does the bench detect?",
        "advise": "say which limit is proven for a deployment, and what a smaller one risks and gains",
        "init": "write a commented case or suite file to start from",
    },
    "Diagnose": {
        "show": "print a report again",
        "replay": "replay a bundle: here, elsewhere, or from its recording alone",
        "bisect": "name the guilty stage of a failing case",
        "shrink": "make a failing case as small as possible",
        "kernels": "show which kernel each number of rows selects",
        "bundle": "make one archive of a failing case to send, with a summary to paste",
        "trace": "show recorded routing, or convert what SGLang and others record",
        "collect": "verdicts from the folder of a torchrun job that has ended",
    },
    "Operate": {
        "doctor": "find problems of this node, and their fixes",
        "cluster": "run on each node alone, on pairs, on all together, to find the node or link at fault",
        "report": "write results as HTML, JUnit, Markdown, CSV, Prometheus text or JSON",
        "compare": "find failures and slowdowns since a baseline",
        "trend": "follow results over many nights: verdicts, pass rates, times",
        "completion": "print a script for bash, zsh or fish that completes commands, options and names",
        "tune": "make a table of the fastest Triton kernels for a layer on this GPU",
    },
    "List": {
        "presets": "the model layers by name",
        "profiles": "what SGLang, vLLM and ATOM set of a case",
        "suites": "the built-in suites",
        "faults": "the faults that --inject takes",
        "plugins": "the transports, experts and callers: built in, and of installed packages",
        "schema": "the JSON Schema of case files, suite files and reports",
    },
}
"""Commands with their one-line helps, by group; each is a module of `cli/`, loaded when it runs."""

_NAMES = tuple(name for group in COMMANDS.values() for name in group)
_SIGINT_EXIT_CODE = 130
_SIGPIPE_EXIT_CODE = 141
_RANK_0_SPEAKS_S = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    resumes = ""
    sys.stdout, sys.stderr = sys.stdout or open_nowhere(), sys.stderr or open_nowhere()
    speak_any_encoding(sys.stdout, sys.stderr)
    try:
        given = sys.argv[1:] if arguments is None else arguments
        options = _parser(_asked(given)).parse_args(given)
        resumes = getattr(options, "resumes", "")
        return _run(options)
    except BrokenPipeError:
        if not _nobody_reads():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the flush at interpreter exit
        return _SIGPIPE_EXIT_CODE
    except DistbenchError as error:
        rank = os.environ.get("RANK", "0") if "TORCHELASTIC_RUN_ID" in os.environ else "0"
        if rank == "0":
            lost = isinstance(error, ResultsLost)
            stopped = lost or isinstance(error, DiskFull)
            _print_error(error.label, f"{error}; {_next_time(resumes=resumes, lost=lost)}" if stopped else str(error))
        else:
            time.sleep(_RANK_0_SPEAKS_S)  # torchrun ends all ranks as soon as one has left
        return error.exit_code
    except Interrupted as error:
        _print_error("INTERRUPTED", f"{error}; {_next_time(resumes=resumes)}")
        return error.exit_code
    except KeyboardInterrupt:
        _print_error("INTERRUPTED", "ended by SIGINT; no rank is left")
        return _SIGINT_EXIT_CODE
    except OSError as error:
        if not is_disk_full(error):
            raise
        full = DiskFull(f"{error.filename or 'standard output'}: {error.strerror}")
        _print_error(full.label, f"{full}; {_next_time(resumes=resumes)}")
        return full.exit_code


def _print_error(ending: str, message: str) -> None:
    from distbench.report.terminal import print_error

    print_error(ending, message)


def _next_time(*, resumes: str, lost: bool = False) -> str:
    """Effect of running the same command again; `resumes` is its text where results are kept, `lost`: some are gone."""
    if resumes and lost:
        return f"{resumes} with the remaining results"
    if resumes:
        return f"finished results are kept; {resumes}"
    return "the same command starts from the beginning"


def _run(options: argparse.Namespace) -> int:
    if options.end_with_stdin:
        end_with_stdin()
    quiet, verbose = (getattr(options, name, False) for name in ("quiet", "verbose"))
    set_voice(Voice.QUIET if quiet else Voice.VERBOSE if verbose else Voice.USUAL)
    name = options.command.__module__.rpartition(".")[2]
    # A rank of torchrun has no thread beside its work: rank 0 prints each case as it ends.
    meter = contextlib.nullcontext() if "TORCHELASTIC_RUN_ID" in os.environ else Meter(name)
    try:
        with meter:
            code = int(options.command(options))
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != "torch":
            raise
        message = f"torch: {error}, for {sys.executable}; run make setup, or use a Python that has torch"
        raise Unsupported(message) from error
    sys.stdout.flush()  # a pipe that is broken shows here, not when the interpreter ends
    return code


def _nobody_reads() -> bool:
    """Whether stdout is a pipe without a reader, as behind `| head`; another pipe may be the broken one."""
    poll = select.poll()
    poll.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _parser(names: Sequence[str] = _NAMES) -> Parser:
    """Parser of these commands; loads their modules only."""
    parser = Parser(
        prog="distbench",
        usage="distbench COMMAND [OPTIONS]",
        description="Does cutting the rows in front of fused_moe change a bit, on any rank?",
        epilog="`distbench COMMAND --help` shows the options of a command. Exit codes: 0 PASS, 1 a wrong result, "
        "2 INVALID, 3 HANG or RANK_FAULT, 70 a crash of the bench, 75 out of time, 77 UNSUPPORTED.",
    )
    parser.add_argument("--version", action="version", version=f"distbench {__version__}")
    parser.add_argument(
        "--end-with-stdin",
        action="store_true",
        help="exit as by SIGTERM on stdin EOF, once at least one byte has arrived: for launchers on other machines",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND", prog="distbench", help=argparse.SUPPRESS)
    parser.listed = COMMANDS
    for name in names:
        import_module(f"distbench.cli.{name}").add(commands)
    return parser


def _asked(arguments: Sequence[str]) -> tuple[str, ...]:
    """The command that the arguments name, none where there is none.

    Raises:
        InvalidCase: no such command.

    """
    given = next((one for one in arguments if not one.startswith("-")), None)
    if given is None or given in _NAMES:
        return () if given is None else (given,)
    message = f"no command {given!r:.40}{closest(given, _NAMES)}; see `distbench --help`"
    raise InvalidCase(message)
