"""Rules of MoRI by release: buffers of AsyncLL, settings that its constructor refuses. Loads no torch.

Read in the wheels amd-mori 1.2.4 and amd-mori-nightly 1.2.5.dev20261012 to 1.2.5.dev20261026
(`dispatch_combine.cpp`). A version that cannot be compared counts as the newest.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import Mapping

from distbench.case.sglang_releases import enables
from distbench.case.spec import Case
from distbench.transport.mori.emulated.quirks import ATOMICS_SWITCH, RELEASES, STAGED_DISPATCH, parse_quirks
from distbench.utils.versions import release_of

DISTRIBUTIONS = ("amd-mori", "amd-mori-nightly")
"""Names under which MoRI is released; both hold the same modules."""
FIRST_WITH_STAGED_DISPATCH = "1.2.5.dev20261024"
"""The first nightly whose AsyncLL has a fourth buffer, dispatchStaging; 1.2.5.dev20261020 has three."""
FIRST_WITH_ATOMICS_SWITCH = "1.2.5.dev20261026"
"""The first nightly that reads MORI_EP_DISABLE_RDMA_ATOMICS; 1.2.5.dev20261025 does not."""

RAIL_ONLY = "MORI_ENABLE_RAIL_ONLY"
NO_ATOMICS = "MORI_EP_DISABLE_RDMA_ATOMICS"
RELAXED_ORDERING = "MORI_IB_ENABLE_RELAXED_ORDERING"


def version_for(case: Case) -> str:
    """Version of MoRI that the case runs: the stand-in's, or the installed one; "" if none is installed."""
    if case.emulate:
        quirks = parse_quirks(case.mori_habits)
        newer = ((ATOMICS_SWITCH, FIRST_WITH_ATOMICS_SWITCH), (STAGED_DISPATCH, FIRST_WITH_STAGED_DISPATCH))
        return next((release for quirk, release in newer if quirk in quirks), next(iter(RELEASES)))
    for name in DISTRIBUTIONS:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(name)
    return ""


def async_buffers(version: str) -> int:
    """Buffers of W * M slots that AsyncLL allocates: dispatchInp, combineInp, staging, and later dispatchStaging."""
    return 4 if _reached(version, FIRST_WITH_STAGED_DISPATCH) else 3


def reads_atomics_switch(version: str) -> bool:
    """Whether the release reads MORI_EP_DISABLE_RDMA_ATOMICS."""
    return _reached(version, FIRST_WITH_ATOMICS_SWITCH)


def refused_settings(kernel: str, nodes: int, environ: Mapping[str, str], version: str) -> str:
    """Reason why MoRI's constructor raises RuntimeError under these variables, with the fix; "" if it does not."""
    if nodes == 1:
        return ""
    if kernel == "AsyncLL" and enables(environ.get(RAIL_ONLY, "")):
        return (
            f"env:{RAIL_ONLY} = {environ[RAIL_ONLY]!r:.40}: AsyncLL on {nodes} nodes sends to ranks without a "
            f"connection; unset it, or use mori_kernel = InterNodeV1 or InterNodeV1LL"
        )
    relaxed = environ.get(RELAXED_ORDERING, "").strip()
    ordered = not relaxed.isdecimal() or int(relaxed) != 1
    if ordered or kernel == "AsyncLL" or not enables(environ.get(NO_ATOMICS, "")) or not reads_atomics_switch(version):
        return ""
    return (
        f"env:{NO_ATOMICS} = {environ[NO_ATOMICS]!r:.40} with {RELAXED_ORDERING}=1: {kernel} on {nodes} nodes would "
        "see a signal before its rows; unset one of them"
    )


def _reached(version: str, first: str) -> bool:
    key, wanted = release_of(version), release_of(first)
    return key is None or wanted is None or key >= wanted
