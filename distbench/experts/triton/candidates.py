"""The kernels that tuning tries for a bucket."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from distbench.experts.rules import padded_rows
from distbench.experts.triton.config import KernelConfig, LayerShape, Tile

_SHARED_BYTES = 227 << 10
_BLOCK_BYTES = 1 << 10


class Family(NamedTuple):
    """Candidates that share a tile of rows, and so the sort: every first with every second."""

    block_m: int
    first: list[tuple[Tile, bool]]
    """Stage 1's tiles, and whether they gather their rows."""
    second: list[Tile]

    def configs(self) -> Iterator[KernelConfig]:
        """Yield configurations in which each tile occurs."""
        for index in range(max(len(self.first), len(self.second))):
            tile, gather = self.first[min(index, len(self.first) - 1)]
            second = self.second[min(index, len(self.second) - 1)]
            yield KernelConfig(block_m=self.block_m, gather=gather, stage1=tile, stage2=second)


# n, k, stages, warps, programs
_SWAPPED_FIRST = ((64, 128, 5, 4, 1), (64, 128, 3, 4, 2), (64, 256, 3, 4, 1), (128, 64, 6, 4, 1), (128, 64, 3, 4, 2),
                  (128, 128, 3, 4, 1), (128, 128, 3, 8, 1), (64, 64, 5, 4, 2), (32, 256, 3, 4, 1))  # fmt: skip
_SWAPPED_SECOND = ((128, 128, 5, 4, 1), (128, 128, 2, 4, 2), (128, 256, 3, 8, 1), (128, 64, 5, 4, 2), (64, 256, 5, 4, 1),
                   (64, 256, 2, 4, 2), (256, 64, 5, 8, 1), (128, 128, 3, 4, 2), (64, 128, 5, 4, 2))  # fmt: skip
_WIDE_FIRST = ((128, 64, 3, 8, 1), (128, 64, 4, 8, 1), (64, 64, 3, 4, 2), (64, 64, 4, 4, 2), (128, 64, 3, 4, 1),
               (128, 128, 2, 8, 1), (64, 128, 3, 8, 1))  # fmt: skip
_WIDE_SECOND = ((128, 64, 3, 4, 2), (256, 64, 3, 8, 1), (256, 64, 4, 8, 1), (128, 64, 4, 4, 2), (128, 128, 3, 8, 1),
                (256, 64, 4, 4, 1))  # fmt: skip


def families(shape: LayerShape, bucket: int) -> list[Family]:
    """Return what to try for a bucket, by how many routes its experts get."""
    routes = padded_rows(bucket) * shape.topk / shape.num_experts
    sizes = [16] if routes <= 4 else [16, 32] if routes <= 16 else [32, 64] if routes <= 32 else [64, 128]  # noqa: PLR2004
    return [_family(block_m, shape, swapped_only=routes <= 16) for block_m in sizes]  # noqa: PLR2004


def _family(block_m: int, shape: LayerShape, *, swapped_only: bool) -> Family:
    fp8 = shape.quant == "fp8"
    first = [(tile, True) for tile in _tiles(_SWAPPED_FIRST, swap=True) if block_m <= 64]  # noqa: PLR2004
    second = [tile for tile in _tiles(_SWAPPED_SECOND, swap=True) if block_m <= 64]  # noqa: PLR2004
    if not swapped_only:
        wide = _tiles(_WIDE_FIRST, swap=False)
        first += [(tile, gather) for tile in wide for gather in (True, False)]
        second += _tiles(_WIDE_SECOND, swap=False)
    return Family(
        block_m,
        [(tile, gather) for tile, gather in first if _fits(tile, block_m, 2, fp8=fp8)],
        [tile for tile in second if _fits(tile, block_m, 1, fp8=fp8)],
    )


def _tiles(rows: tuple[tuple[int, int, int, int, int], ...], *, swap: bool) -> list[Tile]:
    plain = [Tile(n=n, k=k, stages=s, warps=w, programs=p, swap=swap) for n, k, s, w, p in rows]
    return plain + [Tile(n=n, k=k, stages=s, warps=w, programs=p, swap=swap, flatten=True) for n, k, s, w, p in rows]


def _fits(tile: Tile, block_m: int, matrices: int, *, fp8: bool) -> bool:
    """Whether the tiles under way fit the shared memory; float8 needs a K of one scale, and columns of one scale."""
    size = 1 if fp8 else 2
    if fp8 and (tile.k != 128 or tile.n > 128 or (matrices == 2 and tile.n != 128)):  # noqa: PLR2004
        return False
    shared = (matrices * tile.n + block_m) * tile.k * size * tile.stages + _BLOCK_BYTES
    return shared * tile.programs <= _SHARED_BYTES
