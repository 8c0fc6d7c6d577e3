"""Options of a fault: defaults and allowed values."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One option: its default, `read` for its text, which raises ValueError, and the allowed values in words."""

    default: Any
    read: Callable[[str], Any]
    allowed: str


def one_of(default: str, *others: str) -> Option:
    """Return an option with one of a few words as value; the default may be none."""
    allowed = tuple(filter(None, (default, *others)))
    return Option(default, partial(_word, allowed), ", ".join(allowed))


def whole(default: int, least: int, most: int) -> Option:
    """Return an option with a whole number from `least` to `most` as value."""
    return Option(default, partial(_number, int, least, most), f"whole numbers from {least} to {most}")


def real(default: float, least: float, most: float) -> Option:
    """Return an option with a number from `least` to `most` as value."""
    return Option(default, partial(_number, float, least, most), f"numbers from {least:g} to {most:g}")


def rank_option(ranks: int, everywhere: str) -> Option:
    """Return the option for one of `ranks` ranks, in digits, or for all; the default is a rank other than 0."""
    words = (*map(str, range(ranks)), everywhere)
    return Option(str(min(1, ranks - 1)), partial(_word, words), f"0 to {ranks - 1}, or {everywhere}")


def _word(allowed: tuple[str, ...], text: str) -> str:
    if text not in allowed:
        raise ValueError(text)
    return text


def _number(kind: type[int | float], least: float, most: float, text: str) -> float:
    value = kind(text)
    if not (math.isfinite(value) and least <= value <= most):
        raise ValueError(text)
    return value
