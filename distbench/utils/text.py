"""Text of messages: values cut to a length, control characters spelled out."""

from __future__ import annotations

import re
from collections.abc import Iterable

_SHOWN_CHARACTERS = 120
_REFUSAL = re.compile(
    r"Expected `(?P<kind>int|float)`(?: (?P<than>[<>]=?) (?P<bound>[-+.e\d]+))?(?:, got `\w+`)?"
    r"(?: - at `\$\[(?P<place>\d+)\]`)?"
)
_KINDS = {"int": "whole numbers", "float": "numbers"}
_BOUNDS = {">=": "from {:.16g} up", "<=": "up to {:.16g}", ">": "above {:.16g}", "<": "below {:.16g}"}


def shown(value: object) -> str:
    """Any value for a message: one line, cut at 120 characters."""
    try:
        return f"{value!r:.{_SHOWN_CHARACTERS}}"
    except (ValueError, RecursionError):  # thousands of digits, or nested almost too deep to be read
        return f"{type(value).__name__} too large to show"


def printable(text: str) -> str:
    """Text with non-printable characters escaped, so that no terminal acts on it and no line is forged."""
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def one_line(error: BaseException | str) -> str:
    """A message without its line breaks and outer blanks."""
    return " ".join(str(error).split())


def in_words(refusal: str) -> str:
    """The numbers that a refusal of msgspec allows, in words; a refusal of anything else as it is."""
    found = _REFUSAL.fullmatch(refusal)
    if found is None:
        return refusal
    bound = f" {_BOUNDS[found['than']].format(float(found['bound']))}" if found["than"] else ""
    place = f"; number {int(found['place']) + 1} is none of them" if found["place"] else ""
    return f"allowed are {_KINDS[found['kind']]}{bound}{place}"


def why(error: BaseException) -> str:
    """What a reader's error says of a file, in one line; numpy's advice to load pickles is left out."""
    if isinstance(error, KeyError) and error.args:
        return f"no {shown(error.args[0])}"
    text = getattr(error, "strerror", None) or one_line(error)
    if "pickle" in text:
        return "pickled objects, which are never loaded"
    return text or ("it ends too early" if isinstance(error, EOFError) else type(error).__name__)


def closest(name: str, known: Iterable[str]) -> str:
    """` (did you mean X?)` for the known name most like `name`; empty where none is."""
    from difflib import get_close_matches  # noqa: PLC0415 - loaded only for a message

    found = get_close_matches(name[:_SHOWN_CHARACTERS], list(known), n=1)
    return f" (did you mean {found[0]}?)" if found else ""


def counted(number: int, noun: str) -> str:
    """A number and its noun, `1 row` or `2 rows`; `noun` is the singular, which may have words before it."""
    ending = "" if number == 1 else "es" if noun.endswith("ch") else "s"
    return f"{number} {noun}{ending}"


def numbers(found: Iterable[int]) -> str:
    """Whole numbers as text: `0, 2-5, 7`."""
    runs: list[list[int]] = []
    for number in sorted(found):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
