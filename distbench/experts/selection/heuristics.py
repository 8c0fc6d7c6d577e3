"""The kernel that aiter selects for a bucket without a tuned row, for gate and up projections."""

from __future__ import annotations

from typing import Literal, NamedTuple

import msgspec

from distbench.experts.selection.kernel_names import DEFAULT_TILE_K
from distbench.experts.selection.releases import BucketRules
from distbench.utils.amd_arch import arch_of

ONE_STAGE_BLOCK_M = 32
_BLOCK_ROWS = (32, 64, 128)
_BLOCK_COLUMNS = 128
_SPLIT_MULTIPLE = 256
_SMALL_BUCKET = 32
_NARROW_INTER = 192
ACTIVATIONS = {"silu": "Silu", "gelu": "Gelu", "swiglu": "Swiglu", "situv2": "Situv2"}
"""aiter's names of activations."""


class LayerKey(msgspec.Struct, frozen=True, kw_only=True):
    """The facts that aiter selects by, except the number of rows. Dimensions in elements."""

    num_local_experts: int
    """Experts whose weights this rank holds: w1.shape[0]."""
    topk: int
    """Columns of topk_ids."""
    model_dim: int
    inter_dim: int
    quant: Literal["bf16", "fp8"] = "bf16"
    """bf16: QuantType.No. fp8: QuantType.per_1x128."""
    activation: str = "silu"
    """A name in `ACTIVATIONS`."""
    doweight_stage1: bool = False
    """Routing weights are applied in stage 1."""
    is_ep: bool = True
    """Whether the call has an expert_mask."""
    cu_count: int = 304
    """Compute units of the device: 304 MI300X, 256 MI355X, 80 MI308X."""
    gfx: str | None = None
    """Architecture; None: derived from `cu_count`, gfx942 where that is unknown."""

    @property
    def arch(self) -> str:
        """The architecture, given or derived."""
        return self.gfx or arch_of(self.cu_count)

    def lookup_topk(self, rules: BucketRules) -> int:
        """Top-k as counted by lookup and heuristics (aiter v0.1.16, get_2stage_cfgs)."""
        return self.topk - 1 if self.is_ep and rules.ep_drops_topk else self.topk


class Stage(NamedTuple):
    """A kernel of one stage, and its K block in elements."""

    name: str
    tile_k: int


class _Tile(NamedTuple):
    columns: int
    k: int
    pipeline: int


# CK's own tiles by rows of a tile, as (inter_dim <= 192, inter_dim above); aiter v0.1.20, gen_instances.py.
_BF16_TILES: dict[tuple[str, int], dict[int, tuple[_Tile, _Tile]]] = {
    ("gfx942", 1): {
        32: (_Tile(64, 64, 1), _Tile(64, 64, 1)),
        64: (_Tile(64, 64, 1), _Tile(128, 64, 3)),
        128: (_Tile(64, 64, 1), _Tile(128, 64, 3)),
    },
    ("gfx942", 2): {
        32: (_Tile(64, 64, 1), _Tile(64, 64, 1)),
        64: (_Tile(64, 64, 1), _Tile(128, 64, 3)),
        128: (_Tile(64, 64, 3), _Tile(128, 64, 3)),
    },
    ("gfx950", 1): {
        32: (_Tile(64, 64, 1), _Tile(64, 64, 1)),
        64: (_Tile(64, 64, 1), _Tile(64, 64, 1)),
        128: (_Tile(64, 64, 1), _Tile(128, 64, 3)),
    },
    ("gfx950", 2): {
        32: (_Tile(64, 64, 1), _Tile(128, 128, 1)),
        64: (_Tile(128, 64, 1), _Tile(128, 128, 1)),
        128: (_Tile(64, 64, 3), _Tile(128, 64, 3)),
    },
}
_BF16_FIRST_TILES = {("gfx942", 1, 64): _Tile(128, 128, 3)}
_FP8_TILES = {16: _Tile(128, 256, 1), 64: _Tile(128, 128, 3)}
_FP8_HALVED_TILE = _Tile(128, 128, 1)


def runs_one_stage(bucket: int, key: LayerKey, rules: BucketRules) -> bool:
    """Return whether one fused kernel runs both stages (aiter v0.1.20, get_2stage_cfgs); never in bf16.

    There are such kernels for SiLU, and since v0.1.12 on gfx950 for Gelu; none applies routing weights in stage 1.
    """
    over = rules.fp8_one_stage_over
    fused = key.activation == "silu" or (key.activation == "gelu" and rules.gelu_one_stage and key.arch == "gfx950")
    if key.quant == "bf16" or over is None or key.doweight_stage1 or not fused:
        return False
    return bucket > over and key.inter_dim % rules.fp8_one_stage_inter == 0


def block_rows(bucket: int, key: LayerKey, rules: BucketRules) -> int:
    """Return the rows of a two-stage tile, block_m (aiter v0.1.20, get_block_size_M).

    bf16: the size that fills the device in the fewest rounds, then the one that leaves the fewest units idle.
    """
    if key.quant == "fp8":
        return 16 if rules.fp8_small_tile and bucket <= _SMALL_BUCKET else 64
    topk = key.lookup_topk(rules)

    def waste(block: int) -> tuple[int, int]:
        slots = bucket * topk + key.num_local_experts * block - topk
        # Divide the product, not its second factor: aiter counts partial blocks of rows this way.
        tiles = -(-key.inter_dim // _BLOCK_COLUMNS) * (slots + block - 1) // block
        return -(-tiles // key.cu_count), key.cu_count - tiles % key.cu_count

    return min(_BLOCK_ROWS, key=waste)


def split_parts(bucket: int, key: LayerKey, rules: BucketRules) -> int:
    """Return the number of K parts in stage 1 of two-stage per_1x128, 0 for none (v0.1.20, get_ksplit).

    With top-k counted as 0 aiter divides by zero here; that counts as no split.
    """
    routes = bucket * key.lookup_topk(rules)
    if key.quant == "bf16" or routes > key.num_local_experts:
        return 0
    tiles = -(-key.inter_dim * rules.fp8_split_columns // _BLOCK_COLUMNS) * routes
    if not 0 < tiles < key.cu_count:
        return 0
    most = -(-key.cu_count // tiles)
    return next((parts for parts in range(most, 1, -1) if key.model_dim % (parts * _SPLIT_MULTIPLE) == 0), 0)


def default_stage(stage: Literal[1, 2], block_m: int, key: LayerKey, rules: BucketRules) -> Stage:
    """Return the library's default kernel for one of two stages, used when aiter names none.

    The names are distbench's: CK's heuristic dispatch (gen_instances.py, v0.1.20) has no names to log.
    """
    if stage == 1 and key.quant == "fp8" and rules.fp8_asm_stage1 and not key.doweight_stage1:
        return Stage(f"asm_stage1_bm{block_m}", DEFAULT_TILE_K)
    tile = _fp8_tile(stage, block_m, key, rules) if key.quant == "fp8" else _bf16_tile(stage, block_m, key, rules)
    name = f"ck_2stages_gemm{stage}_bm{block_m}_n{tile.columns}_k{tile.k}_v{tile.pipeline}"
    return Stage(name, tile.k)


def _fp8_tile(stage: Literal[1, 2], block_m: int, key: LayerKey, rules: BucketRules) -> _Tile:
    tile = _FP8_TILES[block_m]
    fits = key.inter_dim % tile.k == 0 or tile.k == _FP8_HALVED_TILE.k
    return tile if stage == 1 or fits or not rules.fp8_fitted_stage2 else _FP8_HALVED_TILE


def _bf16_tile(stage: Literal[1, 2], block_m: int, key: LayerKey, rules: BucketRules) -> _Tile:
    family = "gfx950" if key.arch == "gfx950" else "gfx942"
    narrow, wide = _BF16_TILES[family, stage][block_m]
    if not rules.bf16_narrow_tiles:
        return _BF16_FIRST_TILES.get((family, stage, block_m), wide)
    return narrow if key.inter_dim <= _NARROW_INTER else wide
