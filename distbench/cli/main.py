"""The command line: parse, dispatch, and map every ending to an exit code."""

from __future__ import annotations

import argparse
import os
import select
import sys
import time
from collections.abc import Sequence
from typing import NoReturn

from distbench import __version__
from distbench.cli import (
    bisect,
    cluster,
    collect,
    compare,
    doctor,
    kernels,
    mutants,
    presets,
    profiles,
    replay,
    report,
    run,
    selftest,
    show,
    shrink,
    suite,
    sweep,
    tune,
)
from distbench.errors import DiskFull, DistbenchError, InvalidCase, ResultsLost, Unsupported, is_disk_full
from distbench.report.console import print_error
from distbench.utils.signals import Interrupted, end_with_stdin
from distbench.utils.streams import speak_any_encoding

_SIGINT_EXIT_CODE = 130
_SIGPIPE_EXIT_CODE = 141
_RANK_0_SPEAKS_S = 3.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    resumes = False
    speak_any_encoding(sys.stdout, sys.stderr)
    try:
        options = _parser().parse_args(arguments)
        resumes = getattr(options, "resumes", False)
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
            print_error(error.label, f"{error}; {_next_time(resumes=resumes, lost=lost)}" if stopped else str(error))
        else:
            time.sleep(_RANK_0_SPEAKS_S)  # torchrun ends all ranks as soon as one has left
        return error.exit_code
    except Interrupted as error:
        print_error("INTERRUPTED", f"{error}; {_next_time(resumes=resumes)}")
        return error.exit_code
    except KeyboardInterrupt:
        print_error("INTERRUPTED", "ended by SIGINT; no rank is left")
        return _SIGINT_EXIT_CODE
    except OSError as error:
        if not is_disk_full(error):
            raise
        full = DiskFull(f"{error.filename or 'standard output'}: {error.strerror}")
        print_error(full.label, f"{full}; {_next_time(resumes=resumes)}")
        return full.exit_code


def _next_time(*, resumes: bool, lost: bool = False) -> str:
    """Effect of running the same command again; `lost`: results that it had found are gone."""
    if resumes and lost:
        return "the same command resumes with the remaining results"
    if resumes:
        return "finished results are kept; the same command resumes"
    return "the same command starts from the beginning"


def _run(options: argparse.Namespace) -> int:
    if options.end_with_stdin:
        end_with_stdin()
    try:
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


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        complaint = f"{message}; see `{self.prog} --help`"
        raise InvalidCase(complaint)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="distbench",
        description="Does cutting the rows in front of fused_moe change a bit, on any rank?",
        epilog="Exit codes: 0 PASS, 1 a wrong result, 2 INVALID, "
        "3 HANG or RANK_FAULT, 70 a crash of the bench, 75 out of time, 77 UNSUPPORTED.",
    )
    parser.add_argument("--version", action="version", version=f"distbench {__version__}")
    parser.add_argument(
        "--end-with-stdin",
        action="store_true",
        help="exit as by SIGTERM on stdin EOF, once at least one byte has arrived: for launchers on other machines",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (
        run,
        suite,
        sweep,
        selftest,
        mutants,
        cluster,
        report,
        compare,
        replay,
        bisect,
        shrink,
        collect,
        kernels,
        doctor,
        tune,
        presets,
        profiles,
        show,
    ):
        command.add(commands)
    return parser
