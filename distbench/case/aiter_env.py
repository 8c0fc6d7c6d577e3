"""External inputs of aiter's choice of kernels: its variables, and the files of tuned kernels that a case names.

A case names one path, or several joined as aiter joins them in AITER_CONFIG_FMOE.
"""

from __future__ import annotations

import os
from pathlib import Path

KERNEL_TABLES = "AITER_CONFIG_FMOE"
KSPLIT = "AITER_KSPLIT"
BYPASS_TUNE = "AITER_BYPASS_TUNE_CONFIG"
NOT_FOLLOWED = tuple(
    f"AITER_{name}"
    for name in (
        *("ONLINE_TUNE", "FLYDSL_EP_NO_FAKE_EXPERT", "FLYDSL_FORCE", "FLYDSL_FORCE_REDUCE", "BF16_FP8_MOE_BOUND"),
        *("FORCE_A8W4", "SITUV2_A8W4", "SITUV2_A4W4", "XBFLOAT16", "FLYDSL_STAGE2_FP8"),
    )
)
"""Further variables that decide aiter's choice of kernels; only the package itself follows them."""


def table_paths(named: str) -> list[str]:
    """Paths in `named`, separated by colons; a path that contains a colon is one path if the file exists."""
    if not named or os.pathsep not in named or Path(named).exists():
        return [named] if named else []
    return [part for part in named.split(os.pathsep) if part]


def table_bytes(named: str) -> bytes:
    """Bytes of the table that `named` names; several CSV files become one, with the columns of all.

    Raises:
        OSError: a file cannot be read.
        ValueError: no path, or several files of which one is no CSV file in UTF-8.

    """
    contents = [Path(path).read_bytes() for path in table_paths(named)]
    return contents[0] if len(contents) == 1 else _merged(contents)


def _merged(contents: list[bytes]) -> bytes:
    import csv  # noqa: PLC0415 - most processes never merge tables
    import io  # noqa: PLC0415

    try:
        parts = [list(csv.DictReader(io.StringIO(content.decode("utf-8-sig"), newline=""))) for content in contents]
    except csv.Error as error:
        raise ValueError(str(error)) from error
    columns = list(dict.fromkeys(column for part in parts for row in part[:1] for column in row if column))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    for part in parts:
        writer.writerows(part)
    return text.getvalue().encode()
