"""Version of the inputs that a case and its seed lead to. Loads no torch."""

from __future__ import annotations

from typing import Annotated

import msgspec

INPUTS_VERSION = 2
"""Raised with every change of routing, tokens, routing weights or experts' weights that some seed leads to.

1: without probes in exact inputs, gaussian weights drawn one by one. 2: with probes, gaussian weights from pools.
"""

InputsVersion = Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]


def other_inputs(version: int) -> str:
    """Both versions in words, where inputs of `version` cannot be generated; else empty."""
    if version == INPUTS_VERSION:
        return ""
    return f"recorded with inputs of version {version}; this distbench generates version {INPUTS_VERSION}"
