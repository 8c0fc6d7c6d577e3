"""Values as people write them in files and flags, and as messages show them."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Sequence
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

REPEAT = "..."
"""Ends a list of tokens: start over until every rank has a number."""

MAX_FILE_BYTES = 256 << 10
_MAX_LINE_DOTS = 500
_SHOWN_CHARACTERS = 120
_HEAP_SIZE = re.compile(r"([0-9]{1,12})(?:([KMG])(?:B|b|iB)?|([kmg])(?:b|ib)?)?")
_SHIFTS = {"": 0, "K": 10, "M": 20, "G": 30}


def split_tokens(raw: Any) -> tuple[Any, tuple[str, ...]]:
    """Return tokens without a `REPEAT` at their end, and that end; text is split at its commas first."""
    value = [part.strip() for part in raw.split(",")] if isinstance(raw, str) else raw
    if isinstance(value, list | tuple) and value[-1:] in ([REPEAT], (REPEAT,)):
        return value[:-1], (REPEAT,)
    return value, ()


@lru_cache(maxsize=256)
def spread_tokens(tokens: int | Sequence[int | str], ep_size: int) -> tuple[int | str, ...]:
    """Return the tokens of each rank: a single number for all, a tuple that ends in `REPEAT` over and over.

    Any other tuple is returned as it is, whatever its length.
    """
    numbers = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    if numbers[-1:] == (REPEAT,):
        return tuple(islice(cycle(numbers[:-1]), ep_size))
    return numbers * ep_size if len(numbers) == 1 else numbers


def parse_heap_size(text: str) -> int:
    """Return the bytes that MoRI makes of MORI_SHMEM_HEAP_SIZE.

    Raises:
        ValueError: not a number with a suffix that MoRI knows: of anything else it takes the digits, `6T` as 6 bytes.

    """
    matched = _HEAP_SIZE.fullmatch(text)
    if matched is None:
        message = "no size; write for instance 6G: MoRI knows K, KB, Kb, KiB, k, kb and kib, and the like of M and G"
        raise ValueError(message)
    return int(matched[1]) << _SHIFTS[(matched[2] or matched[3] or "").upper()]


def shown(value: object) -> str:
    """Return a value for a message: one line, cut at 120 characters, whatever it is."""
    try:
        return f"{value!r:.{_SHOWN_CHARACTERS}}"
    except (ValueError, RecursionError):  # thousands of digits, or nested almost too deep to be read
        return f"{type(value).__name__} too large to show"


def read_table_file(path: str) -> bytes:
    """Return the bytes of a file, or the first of them that are too many for a table of cases.

    Raises:
        OSError: it cannot be read.
        ValueError: not a path, or no plain file, such as a pipe that nobody may ever write to.

    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            message = "no plain file"
            raise ValueError(message)
        return file.read(MAX_FILE_BYTES + 1)


def refuse_bulk(content: bytes) -> None:
    """Refuse what a decoder of TOML would take minutes and gigabytes for.

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


def printable(text: str) -> str:
    """Text with each character that is not printable as its escape: no terminal acts on it, no line is forged."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def one_line(error: BaseException | str) -> str:
    """Return a message without its line breaks and outer blanks."""
    return " ".join(str(error).split())
