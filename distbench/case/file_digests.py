"""Digests of the files that a case names: its kernel table and its caller's wheel."""

from __future__ import annotations

import hashlib
import os

from distbench.case.aiter_env import table_bytes
from distbench.case.table_file import open_regular
from distbench.errors import InvalidCase
from distbench.utils.text import one_line

_WHEEL_PART, _MOST_WHEEL_BYTES = 1 << 20, 4 << 30


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


def wheel_digest(path: str) -> str:
    """SHA-256 of a caller's wheel, as hex; empty for none.

    Raises:
        InvalidCase: it cannot be read, or is larger than 4 GiB.

    """
    if not path:
        return ""
    digest = hashlib.sha256()
    try:
        with os.fdopen(open_regular(path), "rb") as stream:
            small = os.fstat(stream.fileno()).st_size <= _MOST_WHEEL_BYTES
            while small and (part := stream.read(_WHEEL_PART)):
                digest.update(part)
    except (OSError, ValueError) as error:
        message = f"caller_wheel = {path!r:.200}: cannot be read ({one_line(error)}); give a wheel"
        raise InvalidCase(message) from error
    if not small:
        message = f"caller_wheel = {path!r:.200}: larger than {_MOST_WHEEL_BYTES >> 30} GiB; give a wheel"
        raise InvalidCase(message)
    return digest.hexdigest()
