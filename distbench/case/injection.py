"""The syntax of a case's faults: `NAME[:key=value,…]`, several joined by semicolons."""

from __future__ import annotations

import re

import msgspec

from distbench.errors import InvalidCase

_NAME = re.compile(r"[a-z0-9-]{1,40}")
_KEY = re.compile(r"[a-z_]{1,40}")


class Injection(msgspec.Struct, frozen=True):
    """One requested fault: its name, and its options as written."""

    name: str
    options: dict[str, str]


def parse_inject(text: str) -> tuple[Injection, ...]:
    """Parse the faults of a case; valid names and options are known to distbench.faults alone.

    Raises:
        InvalidCase: the text has another form.

    """
    return tuple(_parse_one(part) for part in filter(None, (one.strip() for one in text.split(";"))))


def _parse_one(part: str) -> Injection:
    name, _, rest = part.partition(":")
    pairs = [tuple(side.strip() for side in one.partition("=")[::2]) for one in rest.split(",")] if rest else []
    options = {key: value for key, value in pairs if _KEY.fullmatch(key) and value}
    if not _NAME.fullmatch(name) or len(options) < len(pairs):
        message = f"inject = {part!r:.80}: allowed is NAME[:key=value,…], such as flipped-bit:rank=1,arm=truncated"
        raise InvalidCase(message)
    return Injection(name, options)
