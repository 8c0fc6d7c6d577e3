"""A stand-in for the package `mori` (amd-mori), over `torch.distributed`; docs/mori.md lists what it imitates.

`mori.shmem` and `mori.ops` have the wheel's names and signatures and are loaded on first use, as there. `assume`
chooses the release and the device that it imitates.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from distbench.transport.mori.emulated.quirks import assume

__version__ = "1.2.4+emulated"
__all__ = ["__version__", "assume"]

_LAZY_SUBMODULES = ("ops", "shmem")


def __getattr__(name: str) -> Any:
    """Load a submodule at its first use."""
    if name not in _LAZY_SUBMODULES:
        message = f"module {__name__!r} has no attribute {name!r}"
        raise AttributeError(message)
    return import_module(f"{__name__}.{name}")
