"""Imitated properties: a release, a device, and selectable faults of released kernels. Loads no torch.

A real aiter finds these in its version, its device and its environment; `assume` sets them here.
"""

from __future__ import annotations

import faulthandler
import os
import sys
from collections.abc import Callable
from typing import NoReturn

import msgspec

from distbench.experts.selection.choice import Overrides
from distbench.experts.selection.releases import BucketRules, rules_for
from distbench.utils.amd_arch import arch_of

WRONG_BUCKET = "wrong-bucket-4"
FAULT_AT_ROWS = "fault-at-304-336"
PAST_ROWS_FAULT = "past-rows-fault"
ALL_ROWS = "all-rows"
ZERO_ROWS = "zero-rows"
UNSET_SPLIT_K = "unset-split-k"

QUIRKS = {
    WRONG_BUCKET: "the kernel of bucket 4 computes something else (aiter #3933)",
    FAULT_AT_ROWS: "a memory fault where M is 304 or 336",
    PAST_ROWS_FAULT: "a memory fault where num_local_tokens is above M; otherwise those past M are lost (ATOM #2176)",
    ALL_ROWS: "num_local_tokens is ignored: stale rows are routed too (rtp-llm #1325)",
    ZERO_ROWS: "all rows come out zero where M is 16 times the valid rows or more (vllm #53108)",
    UNSET_SPLIT_K: "split-k adds to memory that was never zeroed (aiter #3997)",
}
"""Faults by name."""

NEWEST = "0.1.20"
"""The release imitated by default: the newest with known rules."""


class Assumed(msgspec.Struct, frozen=True, kw_only=True):
    """The release and the machine that the stand-in imitates."""

    quirks: frozenset[str] = frozenset()
    version: str = NEWEST
    cu_count: int = 304
    table: str = ""
    """Path of the tuned table, or several joined by colons; empty: a table without rows."""
    overrides: Overrides = Overrides()
    """Environment variables of a real aiter."""
    seed: int = 0
    """Seed of the order of atomic adds."""

    @property
    def rules(self) -> BucketRules:
        """The release's selection rules."""
        return rules_for(self.version)

    @property
    def gfx(self) -> str:
        """The device's architecture."""
        return arch_of(self.cu_count)


_assumed = Assumed()
_caches: list[Callable[[], None]] = []


def parse_quirks(text: str) -> frozenset[str]:
    """Read a comma-separated list of `QUIRKS`.

    Raises:
        ValueError: an unknown name.
    """
    names = frozenset(filter(None, (part.strip() for part in text.split(","))))
    for name in sorted(names - QUIRKS.keys()):
        message = f"{name!r:.60} is no quirk of aiter's stand-in; allowed are {', '.join(QUIRKS)}"
        raise ValueError(message)
    return names


def assume(assumed: Assumed) -> None:
    """Imitate `assumed` from now on, as a newly started process would."""
    global _assumed  # noqa: PLW0603 - a package has one version per process
    if assumed != _assumed:
        _assumed = assumed
        for clear in _caches:
            clear()


def forget_with(clear: Callable[[], None]) -> None:
    """Call `clear` whenever the assumptions change."""
    _caches.append(clear)


def assumed() -> Assumed:
    """Return the current assumptions."""
    return _assumed


def has(quirk: str) -> bool:
    """Whether the stand-in has this quirk now."""
    return quirk in _assumed.quirks


def fault(message: str) -> NoReturn:
    """End the process as a memory fault on the GPU does."""
    sys.stderr.write(f"aiter (emulated): memory access fault: {message}\n")
    sys.stderr.flush()
    faulthandler.disable()
    os.abort()
