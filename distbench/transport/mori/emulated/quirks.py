"""Behaviour that differs between releases of mori, chosen by release or one by one, and the device. Loads no torch."""

from __future__ import annotations

import os
import sys
import time
from typing import NoReturn

from distbench.utils.amd_arch import Fp8Format
from distbench.utils.amd_arch import fp8_format as format_of

NO_CONSTRUCTOR_BARRIER = "no-constructor-barrier"
NO_ROW_GUARD = "no-row-guard"
INTRANODE_OVERFLOW_ASSERT = "intranode-overflow-assert"
NO_OVERFLOW_ASSERT = "no-overflow-assert"
LL_ALL_SLOTS = "ll-all-slots"
STALE_RECEIVE = "stale-receive"
STALE_PUSH = "stale-push"
STALE_OUTPUT = "stale-output"
STAGED_DISPATCH = "staged-dispatch"
ATOMICS_SWITCH = "atomics-switch"

QUIRKS = (
    *(NO_CONSTRUCTOR_BARRIER, NO_ROW_GUARD, INTRANODE_OVERFLOW_ASSERT, NO_OVERFLOW_ASSERT, LL_ALL_SLOTS),
    *(STALE_RECEIVE, STALE_PUSH, STALE_OUTPUT, STAGED_DISPATCH, ATOMICS_SWITCH),
)
"""Each is a difference from release 1.2.4, that of the wheels under test."""

RELEASES: dict[str, tuple[str, ...]] = {
    "1.2.4": (),
    "1.2.2": (NO_CONSTRUCTOR_BARRIER, NO_ROW_GUARD, INTRANODE_OVERFLOW_ASSERT),
    "1.2.5.dev20261026": (STAGED_DISPATCH, ATOMICS_SWITCH),
}
"""Quirks by release; the first one is that of the wheels under test."""

_assumed: frozenset[str] = frozenset()
_arch = "gfx942"


def parse_quirks(text: str) -> frozenset[str]:
    """Read a comma-separated list of releases and quirks; empty is 1.2.4.

    Raises:
        ValueError: a name that is neither.

    """
    found: set[str] = set()
    for name in filter(None, (part.strip() for part in text.split(","))):
        if name not in RELEASES and name not in QUIRKS:
            message = f"{name!r:.60} is neither a release ({', '.join(RELEASES)}) nor a quirk ({', '.join(QUIRKS)})"
            raise ValueError(message)
        found |= set(RELEASES.get(name, (name,)))
    return frozenset(found)


def assume(text: str, arch: str) -> None:
    """Imitate the releases and quirks of `text` on a device of `arch` from now on; see `parse_quirks`."""
    global _assumed, _arch
    _assumed, _arch = parse_quirks(text), arch


def fp8_format() -> Fp8Format:
    """Return the e4m3 format that kernels are compiled for."""
    return format_of(_arch)


def has(quirk: str) -> bool:
    """Whether the stand-in has this quirk now."""
    return quirk in _assumed


def trap(message: str) -> NoReturn:
    """End the process as an assertion or a memory fault on the GPU does."""
    sys.stderr.write(f"mori (emulated): {message}\n")
    sys.stderr.flush()
    os.abort()


def spin() -> NoReturn:
    """Wait for a signal that never comes, without a timeout, as a kernel does."""
    while True:
        time.sleep(1)


def refuse(what: str) -> NoReturn:
    """Report a part of the package that is not imitated.

    Raises:
        NotImplementedError: always.
    """
    message = f"mori (emulated): {what} is not imitated"
    raise NotImplementedError(message)
