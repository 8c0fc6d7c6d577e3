"""Environment variables that hold numbers, or are switches."""

from __future__ import annotations

from distbench.errors import InvalidCase

_MOST_DIGITS = 18


def switch(name: str, text: str) -> bool:
    """Whether the environment variable `name`, whose value is `text`, is 1 and not 0.

    Raises:
        InvalidCase: another text; names the variable, its value and the fix.

    """
    if text not in ("0", "1"):
        message = f"env:{name} = {text!r:.60}: allowed are 0 and 1; correct or unset it"
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
