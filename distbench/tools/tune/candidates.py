"""Candidate kernels of a bucket for tuning."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import msgspec

from distbench.experts.selection.kernel_names import Stage2Mode
from distbench.experts.triton.config import (
    CLUSTER_PLACES,
    KernelConfig,
    KernelKind,
    LayerShape,
    Tile,
    cluster_tiles,
    fits_clusters,
)

_SHARED_BYTES = 227 << 10
_BLOCK_BYTES = 1 << 10
_FP8_K = 128
_WGMMA_ROWS = 64
# Routes of an expert; up to this many the weights are all that counts.
_CLUSTER_ROUTES = 32

# Columns, K, stages, warps, programs per multiprocessor.
_Numbers = tuple[int, int, int, int, int]
_SWAPPED1: tuple[_Numbers, ...] = (
    (64, 64, 5, 4, 2),
    (64, 128, 3, 4, 2),
    (64, 128, 5, 4, 1),
    (64, 256, 3, 4, 1),
    (128, 64, 3, 4, 2),
    (128, 64, 6, 4, 1),
    (128, 128, 3, 4, 1),
)
_SWAPPED2: tuple[_Numbers, ...] = (
    (64, 128, 5, 4, 2),
    (64, 256, 5, 4, 1),
    (128, 64, 5, 4, 2),
    (128, 128, 2, 4, 2),
    (128, 128, 3, 4, 2),
    (128, 128, 5, 4, 1),
    (128, 256, 3, 8, 1),
)
_WIDE1: tuple[_Numbers, ...] = (
    (64, 64, 3, 4, 2),
    (64, 64, 4, 4, 2),
    (128, 64, 3, 4, 1),
    (128, 64, 3, 8, 1),
    (128, 64, 4, 8, 1),
)
_WIDE2: tuple[_Numbers, ...] = (
    (128, 64, 3, 4, 2),
    (128, 64, 4, 4, 2),
    (256, 64, 4, 4, 1),
    (256, 64, 3, 8, 1),
    (256, 64, 4, 8, 1),
)
_FP8: tuple[_Numbers, ...] = (
    (128, 128, 3, 4, 2),
    (128, 128, 2, 8, 2),
    (128, 128, 3, 8, 1),
    (128, 128, 4, 8, 1),
    (128, 128, 5, 4, 1),
)
_TILE_ROWS: tuple[tuple[float, tuple[int, ...]], ...] = (
    (4, (16,)),
    (16, (16, 32)),
    (32, (32, 64)),
    (math.inf, (64, 128)),
)
"""Candidate rows of a tile, by the largest number of routes of an expert."""


class First(NamedTuple):
    """The variable parameters of stage 1."""

    tile: Tile
    gather: bool
    splits: int = 1


class Family(NamedTuple):
    """Candidates with one tile of rows and so one sort; each stage is chosen separately."""

    block_m: int
    mode: Stage2Mode
    first: list[First]
    second: list[Tile]
    kernel: KernelKind = "triton"

    def config(self, first: First, second: Tile) -> KernelConfig:
        """Return the complete choice."""
        return KernelConfig(
            block_m=self.block_m,
            gather=first.gather,
            stage1=first.tile,
            stage2=second,
            mode=self.mode,
            splits=first.splits,
            kernel=self.kernel,
        )

    def configs(self) -> Iterator[KernelConfig]:
        """Yield choices that together contain each candidate of either stage."""
        for index in range(max(len(self.first), len(self.second))):
            yield self.config(self.first[index % len(self.first)], self.second[index % len(self.second)])


def families(shape: LayerShape, bucket: int, mode: Stage2Mode = "reduce", *, clusters: bool = False) -> list[Family]:
    """Return the candidates of a bucket, by the routes of an expert under uniform load.

    With `clusters`, the kernels in CUDA C++ are among them for many routes, as far as `mode` and `shape` allow.
    """
    routes = bucket * shape.topk / shape.num_experts
    sizes = next((sizes for most, sizes in _TILE_ROWS if routes <= most), ())
    found = [_family(size, shape, routes, mode) for size in sizes]
    if clusters and mode == "reduce" and routes > _CLUSTER_ROUTES and fits_clusters(shape):
        first, second = cluster_tiles(shape.quant)
        found.append(Family(CLUSTER_PLACES, mode, [First(first, gather=False)], [second], "cuda"))
    return found


def _family(block_m: int, shape: LayerShape, routes: float, mode: Stage2Mode) -> Family:
    fp8 = shape.quant == "fp8"
    swapped1, swapped2, wide1, wide2 = (_FP8,) * 4 if fp8 else (_SWAPPED1, _SWAPPED2, _WIDE1, _WIDE2)
    first, second = [], []
    if block_m <= _WGMMA_ROWS:
        first += [First(tile, gather=True) for tile in _tiles(swapped1, swap=True)]
        second += _tiles(swapped2, swap=True)
    if block_m >= _WGMMA_ROWS:
        first += [First(tile, gather) for tile in _tiles(wide1, swap=False) for gather in (True, False)]
        second += _tiles(wide2, swap=False)
    first = [one for one in first if _fits(one.tile, block_m, 2, fp8=fp8)]
    if routes < 1:
        first += [one._replace(splits=splits) for one in first for splits in (2, 4)]
    second = [tile for tile in second if _fits(tile, block_m, 1, fp8=fp8)]
    flat = [msgspec.structs.replace(tile, flatten=True) for tile in second]
    return Family(block_m, mode, first, second + flat)


def _tiles(numbers: tuple[_Numbers, ...], *, swap: bool) -> list[Tile]:
    return [Tile(n=n, k=k, stages=stages, warps=warps, programs=p, swap=swap) for n, k, stages, warps, p in numbers]


def _fits(tile: Tile, block_m: int, matrices: int, *, fp8: bool) -> bool:
    """Whether the tiles in flight fit the shared memory, and the sums the registers (256 for each of four warps)."""
    size = 1 if fp8 else 2
    shared = (matrices * tile.n + block_m) * tile.k * size * tile.stages + _BLOCK_BYTES
    sums = matrices * tile.n * block_m / (tile.warps * 32)
    return shared * tile.programs <= _SHARED_BYTES and sums <= _FP8_K
