"""Numbers on the command line: each option has its range, and a refusal names it."""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable

MOST = 1 << 24
MOST_RANKS = 1 << 16
LEAST_SECONDS = 0.001
_MOST_SECONDS = 31 * 86400.0
_UNITS = {"h": 3600, "m": 60, "s": 1}
_POWERS = {"k": 1 << 10, "m": 1 << 20}
_COUNT = re.compile(r"(?<![\w.])(\d{1,12})([kKmM])(?![\w.])", re.ASCII)
_DURATION = re.compile(r"(?=\d)(?:(?P<h>\d{1,6})h)?(?:(?P<m>\d{1,6})m)?(?:(?P<s>\d{1,8})s)?", re.ASCII)


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """Parser of whole numbers from `least` to `most`."""

    def read(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            number = least - 1
        if not least <= number <= most:
            _refuse(text, f"whole numbers from {least} to {most}")
        return number

    return read


def seconds(least: float = 0.0) -> Callable[[str], float]:
    """Parser of seconds, from `least` up to a month."""

    def read(text: str) -> float:
        try:
            number = float(text)
        except ValueError:
            number = float("nan")
        if not least <= number <= _MOST_SECONDS:
            _refuse(text, f"seconds from {least:g} to {_MOST_SECONDS:g}")
        return number

    return read


def share(text: str) -> float:
    """A share above 0, up to 1."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        _refuse(text, "shares above 0, up to 1, such as 0.97")
    return number


def plain_counts(text: str) -> str:
    """Text with the numbers of tokens or rows in it spelled out: 4k is 4096, 1m is 1048576, as in nccl-tests."""
    return _COUNT.sub(lambda found: str(int(found[1]) * _POWERS[found[2].lower()]), text)


def duration(text: str) -> float:
    """Seconds of `90`, `90s`, `20m` or `1h30m`; infinity for `none`. `1h30` is refused as ambiguous."""
    if text == "none":
        return math.inf
    given = text.strip()
    found = _DURATION.fullmatch(f"{given}s" if given.isdigit() else given)
    total = sum(int(found[unit] or 0) * size for unit, size in _UNITS.items()) if found else 0
    if not 0 < total <= _MOST_SECONDS:
        _refuse(text, "durations such as 90s, 20m and 1h30m, up to a month, or none")
    return float(total)


def _refuse(text: str, allowed: str) -> None:
    message = f"{text!r:.40} is refused; allowed are {allowed}"
    raise argparse.ArgumentTypeError(message)
