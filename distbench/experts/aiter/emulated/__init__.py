"""A stand-in for the package `aiter` (amd-aiter), in plain torch; docs/aiter.md lists what it imitates.

`aiter.fused_moe`, `aiter.ops.shuffle` and the rest have the wheel's names and signatures. `quirks.assume` chooses the
release and the device that it imitates.
"""

from __future__ import annotations

import importlib
import logging
from typing import Any

from distbench.experts.aiter.emulated.enums import ActivationType, QuantType

__all__ = ["ActivationType", "QuantType", "logger", "quirks"]

logger = logging.getLogger("aiter")


def __getattr__(name: str) -> Any:
    if name == "dtypes":  # the first import that loads torch
        return importlib.import_module("distbench.experts.aiter.emulated.utility.dtypes")
    raise AttributeError(name)
