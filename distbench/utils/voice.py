"""How much a command prints: its result alone, its usual text, or everything."""

from __future__ import annotations

from enum import Enum


class Voice(Enum):
    """--quiet, neither, or --verbose."""

    QUIET = "quiet"
    USUAL = "usual"
    VERBOSE = "verbose"


_VOICES = [Voice.USUAL]


def set_voice(voice: Voice) -> None:
    """Set the voice of this process."""
    _VOICES[:] = [voice]


def voice() -> Voice:
    """The voice of this process."""
    return _VOICES[0]
