"""Digests of the files that a case names: its recorded routing, its kernel table and its caller's wheel."""

from __future__ import annotations

import hashlib
import os

from distbench.case.aiter_env import table_bytes
from distbench.case.table_file import open_regular
from distbench.case.trace_name import trace_name
from distbench.errors import InvalidCase
from distbench.utils.text import one_line

_PART, _MOST_BYTES = 1 << 20, 4 << 30


def table_digest(path: str, source: str) -> str:
    """SHA-256 of the kernel table that `source` names, as hex; empty for none.

    Raises:
        InvalidCase: it cannot be read.

    """
    if not path:
        return ""
    try:
        return hashlib.sha256(table_bytes(path)).hexdigest()
    except (OSError, ValueError) as error:
        message = (
            f"kernel_table = {path!r:.200} ({source}): cannot be read ({one_line(error)}); give a readable CSV file"
        )
        raise InvalidCase(message) from error


def routing_digest(routing: str) -> str:
    """SHA-256 of the recorded routing that a case names, as hex; empty for another kind.

    Raises:
        InvalidCase: it cannot be read, or is larger than 4 GiB.

    """
    named = trace_name(routing)
    return _digest(named.path, "routing = trace:", "a trace of distbench") if named else ""


def wheel_digest(path: str) -> str:
    """SHA-256 of a caller's wheel, as hex; empty for none.

    Raises:
        InvalidCase: it cannot be read, or is larger than 4 GiB.

    """
    return _digest(path, "caller_wheel = ", "a wheel") if path else ""


def _digest(path: str, key: str, kind: str) -> str:
    digest = hashlib.sha256()
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            small = os.fstat(stream.fileno()).st_size <= _MOST_BYTES
            while small and (part := stream.read(_PART)):
                digest.update(part)
    except (OSError, ValueError) as error:
        message = f"{key}{path!r:.200}: cannot be read ({one_line(error)}); give {kind}"
        raise InvalidCase(message) from error
    if not small:
        message = f"{key}{path!r:.200}: larger than {_MOST_BYTES >> 30} GiB; give {kind}"
        raise InvalidCase(message)
    return digest.hexdigest()
