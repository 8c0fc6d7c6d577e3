"""Properties of the device: the assumed one."""

from __future__ import annotations

from distbench.experts.aiter.emulated.quirks import assumed


def get_gfx() -> str:
    """Return the architecture."""
    return assumed().gfx


def get_cu_num() -> int:
    """Return the number of compute units."""
    return assumed().cu_count
