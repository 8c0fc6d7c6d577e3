"""Environment variables that hold numbers, or are switches."""

from __future__ import annotations

from collections.abc import Mapping

from distbench.errors import InvalidCase

SHARED_MEMORY = "DISTBENCH_SHARED_MEMORY"
"""0 makes ranks of one host communicate as those of several hosts do."""
_MOST_DIGITS = 18


def shares_memory(environ: Mapping[str, str]) -> bool:
    """Whether ranks of one host may exchange rows through memory.

    Raises:
        InvalidCase: DISTBENCH_SHARED_MEMORY is neither 0 nor 1.

    """
    text = environ.get(SHARED_MEMORY) or "1"
    if text not in ("0", "1"):
        message = f"env:{SHARED_MEMORY} = {text!r:.60}: allowed are 0 and 1; correct or unset it"
        raise InvalidCase(message)
    return text == "1"


def whole(name: str, text: str, least: int = 0, fix: str = "correct or unset it") -> int:
    """The whole number in the environment variable `name`, whose value is `text`.

    Raises:
        InvalidCase: another text, or a number below `least`; names the variable, its value, the bound and the fix.

    """
    digits = text.strip()
    if not (digits.isascii() and digits.isdigit() and len(digits) <= _MOST_DIGITS and int(digits) >= least):
        message = f"env:{name} = {text!r:.60}: allowed are whole numbers from {least} up; {fix}"
        raise InvalidCase(message)
    return int(digits)
