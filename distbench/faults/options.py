"""The options of a fault: what each is where nobody says, and what it may be."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple


class Option(NamedTuple):
    """One option: its default, `read` for its text, which raises ValueError, and in words what is allowed."""

    default: Any
    read: Callable[[str], Any]
    allowed: str


def one_of(default: str, *others: str) -> Option:
    """Return an option that is one of some words; the default may be none."""
    allowed = tuple(filter(None, (default, *others)))
    return Option(default, partial(_word, allowed), ", ".join(allowed))


def whole(default: int, least: int, most: int) -> Option:
    """Return an option that is a whole number from `least` to `most`."""
    return Option(default, partial(_number, int, least, most), f"whole numbers from {least} to {most}")


def real(default: float, least: float, most: float) -> Option:
    """Return an option that is a number from `least` to `most`."""
    return Option(default, partial(_number, float, least, most), f"numbers from {least:g} to {most:g}")


def rank_option(ranks: int, everywhere: str) -> Option:
    """Return the option that names one of `ranks` ranks, by its digits, or all; a rank other than 0 unless told."""
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
