"""AMD's architectures: how many compute units tell them, and the fp8 that each computes with. Loads no torch."""

from __future__ import annotations

from typing import Literal

Fp8Format = Literal["e4m3fn", "e4m3fnuz"]
"""e4m3 as the OCP has it: up to 448, two zeros. Or as gfx942 does: up to 240, no -0.0, and one NaN in its place."""

GFX_BY_CU_COUNT = {80: "gfx942", 256: "gfx950", 304: "gfx942"}
"""Architecture by compute units, where a tuned table or a caller gives none (aiter v0.1.20, gfx_from_cu_num)."""

LARGEST_FP8: dict[Fp8Format, float] = {"e4m3fn": 448.0, "e4m3fnuz": 240.0}


def arch_of(cu_count: int) -> str:
    """Return the architecture that aiter takes a device with so many compute units for."""
    return GFX_BY_CU_COUNT.get(cu_count, "gfx942")


def fp8_format(arch: str) -> Fp8Format:
    """Return the e4m3 of an architecture; of those that distbench knows, only gfx942 (MI300) is not the OCP's."""
    return "e4m3fnuz" if arch == "gfx942" else "e4m3fn"
