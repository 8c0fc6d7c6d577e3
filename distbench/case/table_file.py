"""Values as users write them in files and flags, and as messages show them."""

from __future__ import annotations

import os
import stat

"""Ends a list of tokens: repeat it until every rank has a number."""

MAX_FILE_BYTES = 256 << 10
_MAX_LINE_DOTS = 500


def read_table_file(path: str) -> bytes:
    """Bytes of a file, cut just above the size allowed for a table of cases.

    Raises:
        OSError: it cannot be read.
        ValueError: not a path, or not a regular file, such as a pipe without a writer.

    """
    with os.fdopen(open_regular(path), "rb") as file:
        return file.read(MAX_FILE_BYTES + 1)


def open_regular(path: str) -> int:
    """Descriptor for reading a file.

    Raises:
        OSError: it cannot be opened.
        ValueError: not a path, or not a regular file, such as a pipe without a writer.

    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        message = "not a regular file"
        raise ValueError(message)
    return descriptor


def refuse_bulk(content: bytes) -> None:
    """Refuse content that would take a TOML decoder minutes and gigabytes.

    Raises:
        ValueError: more bytes, or more dots on one line, than any table of cases needs.

    """
    if len(content) > MAX_FILE_BYTES:
        message = f"more than {MAX_FILE_BYTES} bytes; split it"
        raise ValueError(message)
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.count(b".") > _MAX_LINE_DOTS:
            message = f"more than {_MAX_LINE_DOTS} dots on line {number}; break the line"
            raise ValueError(message)
