"""Writing what makes the parts of a bundle whole. Loads no torch: the parent does it for ranks that are lost."""

from __future__ import annotations

from pathlib import Path

import msgspec

from distbench.bundle.layout import KERNEL_TABLE, MANIFEST, MAX_TABLE_BYTES, REPORT, Manifest, Recorded
from distbench.report.console import print_note
from distbench.report.document import Report
from distbench.report.files import write_atomically, write_report
from distbench.verify.records import Gathered, Outcome


def write_manifest(folder: Path, report: Report, outcome: Outcome, recorded: Recorded) -> None:
    """Write what makes the parts a bundle. Where that cannot be written it is said, and the verdict stands."""
    try:
        _write(folder, report, outcome, recorded)
    except OSError as error:
        print_note(f"no bundle of case {report.name}: {error.filename or folder}: {error.strerror}; its verdict stands")


def _write(folder: Path, report: Report, outcome: Outcome, recorded: Recorded) -> None:
    """Write the report, the kernel table, and the manifest last."""
    write_report(folder / REPORT, report)
    case, question = outcome.case, outcome.question
    if case.kernel_table:
        table = Path(case.kernel_table).read_bytes()
        if len(table) <= MAX_TABLE_BYTES:
            write_atomically(folder / KERNEL_TABLE, table)
    manifest = Manifest(
        how_to_replay=[
            f"distbench replay {folder}",
            f"distbench replay {folder} --device cpu --transport collective --experts reference",
            f"distbench replay {folder} --offline",
        ],
        case=case,
        traffic=question.traffic if question else None,
        limit=question.limit if question else None,
        gathered=_without_timings(outcome.gathered),
        recorded=recorded,
    )
    write_atomically(folder / MANIFEST, msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n")


def _without_timings(gathered: Gathered | None) -> Gathered | None:
    if gathered is None:
        return None
    records = [msgspec.structs.replace(record, durations_us={}) for record in gathered.observations]
    return msgspec.structs.replace(gathered, observations=records)
