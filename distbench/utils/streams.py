"""Standard output and error in any encoding."""

from __future__ import annotations

import codecs
import locale
import os
from io import TextIOWrapper
from pathlib import Path
from typing import TextIO

_PLAIN = "distbench.plain"
_ASCII_NAMES = ("ANSI_X3.4-1968", "US-ASCII", "646")
_SPELLED = {
    "\u2192": "->",
    "\u2500": "-",
    "\u2502": "|",
    "\u2588": "#",
    "\u2026": "...",
    "\u00b5": "u",
    "\u00b7": "*",
    "\u00d7": "x",
    "\u00b1": "+-",
    "\u2713": "yes",
    "\u2717": "no",
}


def open_nowhere() -> TextIO:
    """A stream for a process that was started without standard output or error; what is written is lost."""
    return Path(os.devnull).open("w", encoding="utf-8")


def speak_any_encoding(*streams: TextIO) -> None:
    """Make the streams transliterate characters that their encoding lacks: an arrow as ->, others by their code."""
    codecs.register_error(_PLAIN, _spelled)
    ascii_only = _locale_is_ascii()
    for stream in streams:
        if not isinstance(stream, TextIOWrapper):
            continue
        if ascii_only:
            stream.reconfigure(encoding="ascii", errors=_PLAIN)
        elif not speaks_all(stream):
            stream.reconfigure(errors=_PLAIN)


def _locale_is_ascii() -> bool:
    """Whether the locale has no more than ASCII: Python writes UTF-8 all the same, unless a variable asks for it."""
    if os.environ.get("PYTHONIOENCODING") or os.environ.get("PYTHONUTF8"):
        return False
    return locale.nl_langinfo(locale.CODESET) in _ASCII_NAMES


def speaks_all(stream: TextIO) -> bool:
    """Whether the stream's encoding has all characters."""
    return stream.encoding is None or stream.encoding.lower().replace("-", "") == "utf8"


def plain(text: str, stream: TextIO) -> str:
    """Text as the stream's encoding has it: an arrow as ->, others by their code."""
    if text.isascii() or speaks_all(stream):
        return text
    codecs.register_error(_PLAIN, _spelled)
    return text.encode(stream.encoding, _PLAIN).decode(stream.encoding)


def _spelled(error: UnicodeError) -> tuple[str | bytes, int]:
    if not isinstance(error, UnicodeEncodeError):
        raise error
    lacking = error.object[error.start : error.end]
    spelled = "".join(_SPELLED.get(one) or one.encode("ascii", "backslashreplace").decode() for one in lacking)
    return spelled, error.end
