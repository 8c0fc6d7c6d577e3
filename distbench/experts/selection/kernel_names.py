"""What a kernel's name says about its arithmetic, for the families that aiter's tuned tables name.

    moe_ck2stages_gemm1_256x64x128x64_1x4_…          threads x rows x columns x K     stage 2: atomic
    flydsl_moe2_…_t32x128x256_reduce_…               rows x columns x K               stage 2: as it says
    flydsl_mxmoe_g2_a4w4_128x256x256_…               rows x columns x K               stage 2: reduce unless _atomic
    opus_moe2_…_t64x256x256_…                        rows x columns x K               stage 2: reduce unless _atomic
    ck_2stages_gemm1_bm32_n64_k64_v1                 as it says; ours, for a heuristic  stage 2: atomic
    _ZN5aiter…fmoe_stage1_…_32x128_…, cktile_…       no K in the name                 stage 2: atomic

A name of no such form has `DEFAULT_TILE_K` and adds its routes up atomically.
"""

from __future__ import annotations

import re
from typing import Literal

Stage2Mode = Literal["reduce", "atomic"]

DEFAULT_TILE_K = 128
"""K of a kernel whose name states none: the columns that share a block scale, the minimum of per_1x128 tiles."""

_TILE = re.compile(r"(?<![0-9x])(?:[0-9]{1,6}x){2,3}([0-9]{1,6})(?![0-9x])")
_DESCRIPTIVE = re.compile(r"ck_2stages_gemm[12]_bm[0-9]{1,6}_n[0-9]{1,6}_k([0-9]{1,6})_")
_CK = re.compile(
    r"(?:moe_ck2stages_gemm[12]_[0-9]{1,6}x[0-9]{1,6}x|ck_2stages_gemm[12]_bm[0-9]{1,6}_n)([0-9]{1,6})(?:x|_k)([0-9]{1,6})_"
)
_SPLIT = re.compile(r"_(?:kb|sk)([0-9]{1,6})(?=_|$)")
_ROUTE_REDUCE_FAMILIES = ("flydsl_mxmoe_g2_", "opus_moe2_")


def tile_k(name: str) -> int:
    """Return the K block of kernel `name` in elements; `DEFAULT_TILE_K` where the name states none."""
    match = _TILE.search(name) or _DESCRIPTIVE.match(name)
    return max(int(match[1]), 1) if match else DEFAULT_TILE_K


def ck_tile(name: str) -> tuple[int, int] | None:
    """Return the columns and K elements of the tile of CK's kernel `name`; None for other kernels.

    CK pads neither: a layer must consist of whole tiles.
    """
    match = _CK.match(name)
    return (int(match[1]), int(match[2])) if match else None


def named_split(name: str) -> int:
    """Return the number of separate K parts of kernel `name`, 0 where the name has none (FlyDSL `_kb4`)."""
    match = _SPLIT.search(name)
    return int(match[1]) if match else 0


def stage2_mode(name: str) -> Stage2Mode:
    """Return the way in which stage-2 kernel `name` sums a token's routes (aiter v0.1.20, stage2_uses_route_reduce).

    `reduce`: one rounding after a sum in slot order. `atomic`: a rounding per route, in the order of arrival; also for
    a one-stage kernel and for every family not known to reduce.
    """
    if "_atomic" in name:
        return "atomic"
    return "reduce" if "_reduce" in name or name.startswith(_ROUTE_REDUCE_FAMILIES) else "atomic"
