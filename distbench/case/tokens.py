"""Tokens of each rank from the `tokens` key of a case."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import cycle, islice
from typing import Any

REPEAT = "..."


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
