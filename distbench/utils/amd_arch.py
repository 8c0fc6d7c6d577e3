"""AMD's architectures: their compute units, and the fp8 format each computes with. Loads no torch."""

from __future__ import annotations

from typing import Literal

Fp8Format = Literal["e4m3fn", "e4m3fnuz"]
"""e4m3 per OCP: max 448, two zeros. Or as on gfx942: max 240, a NaN in place of -0.0 and no other."""

GFX_BY_CU_COUNT = {80: "gfx942", 256: "gfx950", 304: "gfx942"}
"""Architecture by compute units, used where neither a tuned table nor a caller names one.

Source: aiter v0.1.20, gfx_from_cu_num.
"""

LARGEST_FP8: dict[Fp8Format, float] = {"e4m3fn": 448.0, "e4m3fnuz": 240.0}


def arch_of(cu_count: int) -> str:
    """Architecture that aiter infers from a device's number of compute units."""
    return GFX_BY_CU_COUNT.get(cu_count, "gfx942")


def fp8_format(arch: str) -> Fp8Format:
    """e4m3 format of an architecture. Of those that distbench knows, only gfx942 (MI300) deviates from OCP."""
    return "e4m3fnuz" if arch == "gfx942" else "e4m3fn"
