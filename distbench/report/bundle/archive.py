"""One file to send: summary, report, case, page, and the recorded rows where there are any. Loads no torch.

The archive is a zip, which issue trackers accept and every system opens. It holds one folder, named by the case's hash;
with recorded rows `distbench replay` takes that folder as it is.
"""

from __future__ import annotations

import hashlib
import re
import shlex
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from distbench.case.spec import FIELD_DEFAULTS, FLAG_KEYS, UNSTORED_KEYS
from distbench.errors import InvalidCase
from distbench.report.bundle.layout import (
    KERNEL_TABLE,
    MANIFEST,
    MAX_TABLE_BYTES,
    MAX_TRACE_BYTES,
    REPORT,
    TRACE,
    part_name,
)
from distbench.report.bundle.masking import Masking
from distbench.report.bundle.read import Bundle, read_bounded, read_part
from distbench.report.bundle.summary import summary_text
from distbench.report.files import atomic_file
from distbench.report.schema import Report
from distbench.utils.text import counted, one_line

SUMMARY = "summary.txt"
CASE = "case.json"
MIB = 1 << 20

_DIGITS = 12
_SUMMARY_BYTES = 96 << 10
"""Room that is kept for the summary, of at most 20,000 characters, and the archive's directory."""
_DIRECTORY_BYTES = 256
"""Bytes of the archive for each file beside its content."""


class Sent(NamedTuple):
    """An archive that was written: its summary, its size in bytes, and what did not fit."""

    summary: str
    size: int
    left_out: list[str]


def write_archive(path: Path, report: Report, recording: Bundle | None, most: int, masking: Masking) -> Sent:
    """Write the archive of at most `most` bytes; it appears whole or not at all.

    Files that do not fit are left out, those of the recorded rows first, and the summary names them.

    Raises:
        InvalidCase: the report alone does not fit, or a part of the recording is damaged.
        OSError: the file cannot be written.

    """
    told: Report = _masked(report, masking, Report)
    folder = _folder(report)
    room = most - _SUMMARY_BYTES
    left_out: list[str] = []
    with atomic_file(path) as file:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in _files(told, recording, masking):
                size = len(zlib.compress(content)) + len(name) + _DIRECTORY_BYTES
                if size <= room:
                    room -= size
                    archive.writestr(_member(folder, name), content, zipfile.ZIP_DEFLATED)
                elif name == REPORT:
                    message = (
                        f"bundle {path}: the report alone takes {size} bytes, allowed are {most}; give more --most"
                    )
                    raise InvalidCase(message)
                else:
                    left_out.append(f"{name} ({size} bytes)")
            text = summary_text(told, [*_notes(folder, told, recording, left_out), *_masks(masking)])
            archive.writestr(_member(folder, SUMMARY), text, zipfile.ZIP_DEFLATED)
        size = file.tell()
    return Sent(text, size, left_out)


def _files(report: Report, recording: Bundle | None, masking: Masking) -> Iterator[tuple[str, bytes]]:
    """Names and contents, those that matter most first; one part of the recording is in memory at a time."""
    yield REPORT, _lines(report)
    values = {key: value for key, value in report.case.items() if key not in (*UNSTORED_KEYS, "hash")}
    yield CASE, _lines(values)
    if recording is not None:
        manifest = masking.document(msgspec.to_builtins(recording.manifest))
        table = _table(recording, masking)
        if table:
            manifest["case"]["kernel_table_sha256"] = hashlib.sha256(table).hexdigest()  # of what is sent
        yield MANIFEST, _lines(manifest)
        if table:
            yield KERNEL_TABLE, table
        if recording.manifest.trace_sha256:
            yield TRACE, read_bounded(recording.folder, TRACE, MAX_TRACE_BYTES)
    yield "results.html", _page(report)
    for part in [] if recording is None else recording.manifest.recorded.parts:
        name = part_name(part.rank)
        if recording is not None and not part.missing and (recording.folder / name).exists():
            yield name, read_part(recording, part).content


def _table(recording: Bundle, masking: Masking) -> bytes:
    """The kernel table without its secrets; empty where the recording has none."""
    if not recording.manifest.case.kernel_table or recording.manifest.table_left_out:
        return b""
    content = read_bounded(recording.folder, KERNEL_TABLE, MAX_TABLE_BYTES)
    return masking.text(content.decode(errors="surrogateescape")).encode(errors="surrogateescape")


def _page(report: Report) -> bytes:
    from distbench.report.html.case_page import case_page  # noqa: PLC0415 - loads Jinja2
    from distbench.report.html.page import render  # noqa: PLC0415 - likewise
    from distbench.report.html.view import pictured  # noqa: PLC0415 - likewise

    page = case_page(pictured(msgspec.json.encode(report)))
    return render("case.html", title=f"{report.verdict.value}: {report.name}", page=page).encode("utf-8", "replace")


def _notes(folder: str, report: Report, recording: Bundle | None, left_out: list[str]) -> Iterator[str]:
    yield "reproduce, in the unpacked archive:"
    table = recording is not None and recording.manifest.case.kernel_table
    flags = f"{_flags(report)} --kernel-table {folder}/{KERNEL_TABLE}" if table else _flags(report)
    if recording is not None and recording.manifest.trace_sha256:
        flags += f" --routing trace:{folder}/{TRACE}"
    yield f"  distbench run --case {folder}/{CASE}{flags}"
    if recording is None:
        yield "no rows are recorded; `distbench run … --bundle DIR` records those of a failing case"
    else:
        tokens = len(recording.manifest.recorded.tokens)
        yield f"  distbench replay {folder}    ({counted(tokens, 'failing token')} recorded)"
        yield from (f"left out when it was recorded: {cut}" for cut in recording.manifest.cuts)
        if recording.manifest.trace_sha256 and _has_tensors(recording):
            yield "HAS HIDDEN STATES OF USERS' REQUESTS, as a capture recorded them: for those alone who may read these"
    if left_out:
        yield f"left out of the archive for its size: {', '.join(left_out)}"


def _has_tensors(recording: Bundle) -> bool:
    from distbench.workload.trace_file import read_header  # noqa: PLC0415 - loads numpy

    return bool(read_header(str(recording.folder / TRACE)).recorded)


def _folder(report: Report) -> str:
    """Name of the archive's folder; a report is a stranger's, so that its hash may be any text."""
    name = str(report.case.get("hash", ""))[:_DIGITS]
    return name if re.fullmatch(r"[0-9a-f]{12}", name) else "report"


def _flags(report: Report) -> str:
    """Flags that a case file cannot stand for, since they name code to execute."""
    named = {key: report.case.get(key, FIELD_DEFAULTS[key]) for key in FLAG_KEYS}
    return "".join(
        f" --{key.replace('_', '-')} {shlex.quote(str(value))}"
        for key, value in named.items()
        if value != FIELD_DEFAULTS[key]
    )


def _masks(masking: Masking) -> Iterator[str]:
    if masking.count:
        yield f"secrets masked: {masking.count}"


def _masked(value: Report, masking: Masking, kind: Any) -> Any:
    try:
        return msgspec.convert(masking.document(msgspec.to_builtins(value)), kind)
    except (msgspec.ValidationError, RecursionError) as error:
        message = f"bundle: {one_line(error)}; give a report that distbench wrote"
        raise InvalidCase(message) from error


def _lines(document: Any) -> bytes:
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def _member(folder: str, name: str) -> zipfile.ZipInfo:
    """A file of the archive with a fixed time, so that the same content makes the same archive."""
    made = zipfile.ZipInfo(f"{folder}/{name}")
    made.external_attr = 0o644 << 16
    made.compress_type = zipfile.ZIP_DEFLATED
    return made
