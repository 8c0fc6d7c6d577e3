"""A choice of Triton kernels: its parts, the default without a table, and its form in the report."""

from __future__ import annotations

import math
from typing import Literal

import msgspec

from distbench.experts.selection.choice import KernelChoice
from distbench.experts.selection.kernel_names import Stage2Mode
from distbench.experts.selection.releases import padded_rows

Quant = Literal["bf16", "fp8"]
KernelKind = Literal["triton", "cuda"]

CLUSTER_PLACES = 224
"""Places of a tile of cluster_products.cu."""
CLUSTER_MULTIPLES = 256, 128
"""What hidden and intermediate size must be multiples of for it."""


class LayerShape(msgspec.Struct, frozen=True, kw_only=True):
    """The layer that kernels are chosen for. Dimensions in elements."""

    num_experts: int
    """Routed experts over all ranks."""
    num_local_experts: int
    hidden_size: int
    intermediate_size: int
    topk: int
    quant: Quant = "bf16"


class Tile(msgspec.Struct, frozen=True, kw_only=True):
    """One stage's kernel: its tile of columns and of K, its pipelining and its distribution over the device."""

    n: int
    k: int
    stages: int
    """Tiles of K in flight at a time."""
    warps: int
    programs: int = 1
    """Programs per multiprocessor."""
    swap: bool = False
    """The weights are the rows of the product."""
    flatten: bool = False
    """The loops over tiles and over K are pipelined as one."""

    def __str__(self) -> str:
        """The tile as a part of a kernel's name."""
        marks = "_swap" * self.swap + "_flat" * self.flatten
        return f"n{self.n}_k{self.k}_s{self.stages}_w{self.warps}_p{self.programs}{marks}"


class KernelConfig(msgspec.Struct, frozen=True, kw_only=True):
    """All kernels of one call. With `gather`, stage 1 reads rows in place rather than from a sorted copy.

    The products are computed by Triton kernels, or by cluster_products.cu. The latter splits block_m places of an
    expert evenly between two blocks; of a tile it takes `stages`, and its other numbers are fixed.
    """

    block_m: int
    gather: bool
    stage1: Tile
    stage2: Tile
    mode: Stage2Mode = "reduce"
    splits: int = 1
    kernel: KernelKind = "triton"

    @property
    def name1(self) -> str:
        """Stage 1's name: all its compile-time parameters."""
        return f"{self.kernel}1_m{self.block_m}_{self.stage1}_{'gather' if self.gather else 'sorted'}_ks{self.splits}"

    @property
    def name2(self) -> str:
        """Stage 2's name, which ends in the way it sums a token's routes."""
        return f"{self.kernel}2_m{self.block_m}_{self.stage2}_{self.mode}"


def fits_clusters(shape: LayerShape) -> bool:
    """Return whether cluster_products.cu can compute a layer."""
    hidden, inter = CLUSTER_MULTIPLES
    return shape.hidden_size % hidden == 0 and shape.intermediate_size % inter == 0


def cluster_tiles(quant: Quant) -> tuple[Tile, Tile]:
    """Return the tiles of cluster_products.cu, by 256 rows of weights of which gate and up have half each."""
    k = 128 if quant == "fp8" else 64
    first, second = (Tile(n=n, k=k, stages=4, warps=12, swap=True) for n in (128, 256))
    return first, second


def cluster_config(quant: Quant) -> KernelConfig:
    """Return the choice of cluster_products.cu."""
    first, second = cluster_tiles(quant)
    return KernelConfig(block_m=CLUSTER_PLACES, gather=False, stage1=first, stage2=second, kernel="cuda")


class TableRow(msgspec.Struct, frozen=True, kw_only=True):
    """The fastest kernels of a bucket, and their microseconds if measured."""

    bucket: int
    config: KernelConfig
    us: float | None = None


def heuristic(shape: LayerShape, rows: int) -> KernelConfig:
    """Return a choice for a bucket without a tuned row, by the routes of an expert under uniform load."""
    routes = padded_rows(rows) * shape.topk / shape.num_experts
    fp8 = shape.quant == "fp8"
    if routes <= 32:  # noqa: PLR2004 - above it wider tiles read the weights once as well
        tile = Tile(n=128, k=128, stages=3, warps=4, swap=True)
        return KernelConfig(block_m=16 if routes <= 8 else 32, gather=True, stage1=tile, stage2=tile)  # noqa: PLR2004
    if routes <= 96:  # noqa: PLR2004
        first = Tile(n=128, k=128 if fp8 else 64, stages=3, warps=8)
        return KernelConfig(block_m=64, gather=True, stage1=first, stage2=first)
    first = Tile(n=128, k=128 if fp8 else 64, stages=3, warps=8)
    second = first if fp8 else Tile(n=256, k=64, stages=3, warps=8)
    return KernelConfig(block_m=128, gather=False, stage1=first, stage2=second)


def routes_per_row(num_experts: int, num_local_experts: int, topk: int) -> float:
    """Return the mean number of local routes of a received row, under uniform routing.

    A row is received if at least one of its distinct experts is local: top-k at EP1, 1.5 of 8 at EP8.
    """
    none_local = math.comb(num_experts - num_local_experts, topk) / math.comb(num_experts, topk)
    return topk * num_local_experts / num_experts / (1 - none_local)


class ConfigSelector(msgspec.Struct, frozen=True, kw_only=True):
    """Chooses kernels for one layer: from the rows of a table, or else by heuristics.

    `tuned_experts` is the number of routed experts that the table was tuned with, 0 for the layer's own. With another
    number of ranks, a row has another number of local routes: the bucket with as many routes is used, or the last.
    """

    shape: LayerShape
    tuned: tuple[TableRow, ...] = ()
    table: str = ""
    tuned_experts: int = 0

    def config(self, rows: int) -> KernelConfig:
        """Return the kernels for a call with `rows` allocated rows."""
        found = self._row(rows)
        return heuristic(self.shape, rows) if found is None else found.config

    def choose(self, rows: int) -> KernelChoice:
        """Return the choice as reports name it."""
        config, found, bucket = self.config(rows), self._row(rows), padded_rows(rows)
        other = f", row of {found.bucket}" if found is not None and found.bucket != bucket else ""
        return KernelChoice(
            rows=rows,
            bucket=bucket,
            source="tuned" if found else "heuristic",
            block_m=config.block_m,
            ksplit=config.splits if config.splits > 1 else 0,
            run_1stage=False,
            stage1=config.name1,
            stage2=config.name2,
            stage2_mode=config.mode,
            tile_k1=config.stage1.k,
            tile_k2=config.stage2.k,
            table=self.table + other if found else "",
        )

    def _row(self, rows: int) -> TableRow | None:
        bucket = self._tuned_bucket(padded_rows(rows))
        return next((row for row in self.tuned if row.bucket == bucket), None)

    def _tuned_bucket(self, bucket: int) -> int:
        """Return the table's bucket whose rows have as many local routes as `bucket` has here."""
        shape = self.shape
        if self.tuned_experts in (0, shape.num_experts) or not self.tuned:
            return bucket
        here, there = (
            routes_per_row(experts, shape.num_local_experts, shape.topk)
            for experts in (shape.num_experts, self.tuned_experts)
        )
        last = max(row.bucket for row in self.tuned)
        alike = padded_rows(math.ceil(bucket * here / there))
        return min(alike, last) if bucket <= last else bucket
