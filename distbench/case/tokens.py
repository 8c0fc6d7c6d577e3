"""Tokens of each rank from the `tokens` key of a case."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from itertools import cycle, islice
from typing import Any, NoReturn

from distbench.errors import InvalidCase

REPEAT = "..."
_MOST_SIZES = 256
_RANGE = re.compile(r"(\d{1,9})(?::(\d{1,9})(?::([*+]?)(\d{1,9}))?)?", re.ASCII)


def split_tokens(raw: Any) -> tuple[Any, tuple[str, ...]]:
    """Tokens without a `REPEAT` at their end, and that end; text is split at its commas first."""
    value = [part.strip() for part in raw.split(",")] if isinstance(raw, str) else raw
    if isinstance(value, list | tuple) and value[-1:] in ([REPEAT], (REPEAT,)):
        return value[:-1], (REPEAT,)
    return value, ()


@lru_cache(maxsize=256)
def spread_tokens(tokens: int | Sequence[int | str], ep_size: int) -> tuple[int | str, ...]:
    """Tokens of each rank: a single number for all, a tuple that ends in `REPEAT` repeated.

    Any other tuple is returned unchanged, whatever its length.
    """
    numbers = (tokens,) if isinstance(tokens, int) else tuple(tokens)
    if numbers[-1:] == (REPEAT,):
        return tuple(islice(cycle(numbers[:-1]), ep_size))
    return numbers * ep_size if len(numbers) == 1 else numbers


def parse_sizes(text: str) -> tuple[int, ...]:
    """Tokens of each rank for a sweep: numbers and ranges between commas, each size once, in the order given.

    A range is START:END:*FACTOR, START:END:+STEP or START:END:STEP; without a third part the factor is 2. Its end
    belongs to it where a step leads there.

    Raises:
        InvalidCase: neither a number nor such a range, or more than 256 sizes.

    """
    sizes: dict[int, None] = {}
    for part in text.split(","):
        found = _RANGE.fullmatch(part.strip())
        if found is None:
            _refuse_sizes(part, "neither a number nor a range")
        start, end = int(found[1]), int(found[2] or found[1])
        by, step = (found[3] or "+", int(found[4])) if found[4] else ("*", 2)
        if end < start or step < 1 + (by == "*") or (by == "*" and not start and end):
            _refuse_sizes(part, "a range that does not get from its start to its end")
        while start <= end:
            sizes[start] = None
            if len(sizes) > _MOST_SIZES:
                _refuse_sizes(part, f"more than {_MOST_SIZES} sizes")
            start = start * step if by == "*" and start else start + step
    return tuple(sizes)


def _refuse_sizes(part: str, why: str) -> NoReturn:
    message = f"sizes {part!r:.40}: {why}; give numbers, or ranges such as 1:4096:*2 and 64:512:+64"
    raise InvalidCase(message)
