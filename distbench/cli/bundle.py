"""`distbench bundle`: one archive of a failing case to send, with a summary to paste."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from distbench.cli.argument_types import whole
from distbench.errors import InvalidCase
from distbench.report.terminal import print_line, print_note
from distbench.utils.text import closest, counted, one_line, printable

if TYPE_CHECKING:
    from distbench.report.bundle.read import Bundle
    from distbench.report.results import Result, Results
    from distbench.report.schema import Report

_DIGITS = 12
_SHOWN = 8
_MOST_MIB = 1 << 10
_DEFAULT_MIB = 24
"""Below the 25 MB that GitHub takes as an attachment of an issue."""


class _Chosen(NamedTuple):
    """A case to send: its report, and its recorded rows where there are any."""

    report: Report
    recording: Bundle | None


def add(commands: Any) -> None:
    """Add the command to the parser."""
    command = commands.add_parser(
        "bundle",
        description="Write one archive of a failing case to send: report, case, page and recorded rows, without "
        "secrets. Prints its summary, to be pasted into an issue.",
    )
    command.set_defaults(command=_bundle)
    command.add_argument(
        "report", metavar="REPORT", help="a report.json, a bundle's folder, or the --out folder of a run or suite"
    )
    command.add_argument("--case", metavar="NAME|HASH", default="", help="which case, where REPORT has several")
    command.add_argument(
        "--bundle", metavar="DIR", default="", help="the DIR that --bundle named when the case ran, for its rows"
    )
    command.add_argument("--out", metavar="FILE", default="", help="the archive (default: distbench-HASH.zip)")
    command.add_argument(
        "--most",
        type=whole(1, _MOST_MIB),
        default=_DEFAULT_MIB,
        metavar="MIB",
        help="largest size; recorded rows that do not fit are left out (default: %(default)s)",
    )


def _bundle(options: argparse.Namespace) -> int:
    from distbench.report.bundle.archive import MIB, write_archive
    from distbench.report.bundle.masking import Masking

    chosen = _chosen(options)
    path = _target(options.out, chosen.report)
    try:
        sent = write_archive(path, *chosen, options.most * MIB, Masking(os.environ))
    except OSError as error:
        message = f"bundle {path}: {error.strerror}; name another file with --out"
        raise InvalidCase(message) from error
    for line in sent.summary.splitlines():
        print_line(line)
    for what in sent.left_out:
        print_note(f"left out of {path}: {what}; --most MIB allows more")
    print_note(f"{path}: {-(-sent.size // 1024)} KiB; attach it, and paste the text above, its summary.txt")
    return 0


def _target(out: str, report: Report) -> Path:
    name = f"distbench-{''.join(filter(str.isalnum, str(report.case.get('hash', ''))))[:_DIGITS] or 'report'}.zip"
    path = Path(out or name)
    return path / name if path.is_dir() else path


def _chosen(options: argparse.Namespace) -> _Chosen:
    """The case that the command line names.

    Raises:
        InvalidCase: a file that cannot be read, or more than one case.

    """
    from distbench.report.bundle.layout import MANIFEST
    from distbench.report.bundle.read import open_bundle
    from distbench.report.results import Results

    if (Path(options.report) / MANIFEST).is_file():
        bundle = open_bundle(options.report)
        return _Chosen(bundle.report, bundle)
    report = _reported(Results(options.report), options.case)
    return _Chosen(report, _recording(options.bundle, report) if options.bundle else None)


def _reported(results: Results, word: str) -> Report:
    """The report of the case named or numbered `word`, else of the only one that did not end as expected."""
    every = list(results)
    if word:
        several = [result for result in every if _is_named(result, word)]
        what = f"{counted(len(several), 'case')} are {printable(word)!r:.80}"
        hint = "" if several else closest(word, (result.name for result in every))
    else:
        several = every if len(every) == 1 else [result for result in every if not result.as_expected]
        what, hint = f"{len(several)} of {counted(len(every), 'case')} did not end as expected", ""
    if len(several) != 1:
        listed = ", ".join(f"{printable(one.name):.80} ({one.hash[:_DIGITS]})" for one in several[:_SHOWN])
        more = f" and {len(several) - _SHOWN} more" if len(several) > _SHOWN else ""
        message = f"results {results.path}: {what}{': ' if listed else ''}{listed}{more}{hint}; "
        raise InvalidCase(message + "name one with --case NAME or --case HASH")
    return _whole(results, several[0].hash)


def _is_named(result: Result, word: str) -> bool:
    return result.name == word or (len(word) >= _SHOWN and result.hash.startswith(word))


def _whole(results: Results, case: str) -> Report:
    import msgspec

    from distbench.report.schema import Report

    raw = next(raw for raw, result in results.lines() if result.hash == case)
    try:
        report: Report = msgspec.json.decode(raw, type=Report)
    except (ValueError, RecursionError) as error:
        message = f"results {results.path}: {one_line(error)}; give results that distbench wrote"
        raise InvalidCase(message) from error
    return report


def _recording(root: str, report: Report) -> Bundle:
    """The bundle of the report's case in the folder that --bundle names, or that folder itself.

    Raises:
        InvalidCase: there is none, or it is of another case.

    """
    from distbench.report.bundle.layout import MANIFEST
    from distbench.report.bundle.read import open_bundle

    own = Path(root) / str(report.case.get("hash", ""))[:_DIGITS]
    bundle = open_bundle(root if (Path(root) / MANIFEST).is_file() else own)
    if bundle.report.case.get("hash") != report.case.get("hash"):
        message = f"bundle {root}: of case {bundle.report.case.get('hash')!s:.12}, not of {own.name}; give that one's"
        raise InvalidCase(message)
    return bundle
