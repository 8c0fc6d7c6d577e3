"""Atomic writing and reading of reports."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import msgspec

from distbench.errors import InvalidCase
from distbench.report.schema import SCHEMA, Report
from distbench.utils.text import one_line


def write_report(path: Path, report: Report) -> None:
    """Write `report` to `path` as JSON, atomically.

    Raises:
        OSError: the folder cannot be made or written.

    """
    write_atomically(path, msgspec.json.format(msgspec.json.encode(report), indent=2) + b"\n")


def read_report(path: str) -> Report:
    """Report in a file.

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
    """Write a file so that it appears whole or not at all, making its folder if needed."""
    with atomic_file(path) as file:
        file.write(content)


@contextlib.contextmanager
def atomic_file(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """Yield a file to write, renamed to `path` when the context ends without an error, and deleted otherwise.

    Its temporary name begins with a dot and has another suffix than `path`; its mode is that of any new file, or 600 if
    it is `private`. After the context it is on disk under its name.
    """
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
        with unfinished.open("xb") as file:
            try:
                if private:
                    os.fchmod(file.fileno(), 0o600)
                yield file
                file.flush()
                os.fsync(file.fileno())
                unfinished.replace(path)
            except BaseException:
                unfinished.unlink(missing_ok=True)
                raise
        sync_folder(path.parent)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Add the file's name to an OSError from within: one raised for a descriptor has none."""
    try:
        yield
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def sync_folder(folder: Path) -> None:
    """Sync `folder`, so that its names are on disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
