"""Reading and writing reports; a reader never sees half a file."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import msgspec

from distbench.errors import InvalidCase
from distbench.report.document import SCHEMA, Report
from distbench.values import one_line


def write_report(path: Path, report: Report) -> None:
    """Write `report` to `path` as JSON, atomically.

    Raises:
        OSError: the folder cannot be made or written.

    """
    write_atomically(path, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def read_report(path: str) -> Report:
    """Read a report back.

    Raises:
        InvalidCase: not readable, not JSON, or not of this schema.

    """
    try:
        content = Path(path).read_bytes()
        return msgspec.json.decode(content, type=Report)
    except (OSError, ValueError, RecursionError) as error:
        message = f"report {path}: {one_line(error)}; give a report.json of schema {SCHEMA}"
        raise InvalidCase(message) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file so that it appears whole or not at all, making its folder if needed; the umask sets its mode."""
    path.parent.mkdir(parents=True, exist_ok=True)
    half = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with half.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except BaseException:
        half.unlink(missing_ok=True)
        raise
