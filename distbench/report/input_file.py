"""A file that names a case: a report, or a case file."""

from __future__ import annotations

from pathlib import Path

import msgspec

from distbench.case.resolve import Layer, load_case_file
from distbench.case.spec import UNSTORED_KEYS
from distbench.report.files import read_report
from distbench.report.schema import Report
from distbench.report.terminal import print_note
from distbench.workload.version import other_inputs


def load_layer(path: str) -> Layer:
    """Keys of a case, from a report or a case file. Print a note where the report's inputs are of another version.

    Raises:
        InvalidCase: the file is neither.

    """
    report = load_report(path)
    if report is None:
        return load_case_file(path)
    if other := other_inputs(report.inputs_version):
        print_note(f"{path}: {other}: the cases here have other inputs of the same seed, and verdicts may differ")
    values = {key: value for key, value in report.case.items() if key not in (*UNSTORED_KEYS, "hash")}
    return Layer(f"report:{path}", values)


def load_report(path: str) -> Report | None:
    """Report in a file; None where the file is no report, but perhaps a case.

    Raises:
        InvalidCase: a report that cannot be read.

    """
    if Path(path).suffix == ".json" and _is_report(Path(path)):
        return read_report(path)
    return None


class _Probe(msgspec.Struct, frozen=True):
    schema: str = ""


def _is_report(path: Path) -> bool:
    try:
        return bool(msgspec.json.decode(path.read_bytes(), type=_Probe).schema)
    except (OSError, ValueError, RecursionError):
        return False
