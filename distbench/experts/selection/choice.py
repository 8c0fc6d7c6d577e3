"""The kernel that `aiter.fused_moe` selects for a row count: rows → bucket → tuned row, or else heuristics.

The row count is the first dimension of its input, valid rows or not (docs/kernel-selection.md).
"""

from __future__ import annotations

from typing import Literal

import msgspec

from distbench.experts.selection.heuristics import (
    ONE_STAGE_BLOCK_M,
    LayerKey,
    block_rows,
    default_stage,
    runs_one_stage,
    split_parts,
)
from distbench.experts.selection.kernel_names import (
    DEFAULT_TILE_K,
    Stage2Mode,
    ck_tile,
    named_split,
    stage2_mode,
    tile_k,
)
from distbench.experts.selection.releases import BUCKET_RULES, CURRENT, BucketRules, padded_rows, rules_for
from distbench.experts.selection.tuned_table import TunedKey, TunedRow, load_tuned_rows, parse_tuned_rows

__all__ = [
    "BUCKET_RULES",
    "CURRENT",
    "BucketRules",
    "KernelChoice",
    "KernelSelector",
    "LayerKey",
    "Overrides",
    "TunedKey",
    "TunedRow",
    "load_tuned_rows",
    "padded_rows",
    "parse_tuned_rows",
    "rules_for",
]


class KernelChoice(msgspec.Struct, frozen=True, kw_only=True):
    """The kernel that a call with `rows` allocated rows runs."""

    rows: int
    bucket: int
    source: Literal["tuned", "heuristic", "named"]
    block_m: int
    """Rows of a tile, and of the blocks into which routes are sorted."""
    ksplit: int
    """Parts of stage 1's K that are summed separately; 0 and 1: none."""
    run_1stage: bool
    stage1: str
    stage2: str
    """Kernel names: the tuned table's, or descriptive ones by distbench; stage 2 is empty for a one-stage kernel."""
    stage2_mode: Stage2Mode
    tile_k1: int
    tile_k2: int
    """K blocks of stage 1 and stage 2, in elements."""
    table: str = ""
    """The table of a tuned choice of the Triton experts."""

    @classmethod
    def named(cls, rows: int, name: str, *, varies: bool = False) -> KernelChoice:
        """Return the choice of a kernel that only has a name, which stands for all that decides its bits.

        A kernel that `varies` gives other bits in each call, as one that adds atomically. Unless the experts state
        their roundings, it counts as one with a bf16 intermediate.
        """
        return cls(
            rows=rows,
            bucket=rows,
            source="named",
            block_m=1,
            ksplit=0,
            run_1stage=False,
            stage1=name,
            stage2="",
            stage2_mode="atomic" if varies else "reduce",
            tile_k1=1,
            tile_k2=1,
        )

    @property
    def label(self) -> str:
        """The choice in a few words, `T` from the tuned table or `H` by heuristics: `H bm32 2-stage atomic k64`.

        That of a kernel which only has a name is the name.
        """
        if self.source == "named":
            return self.stage1
        stages = "1-stage" if self.run_1stage else "2-stage"
        k = f"k{self.tile_k1}" if self.tile_k1 == self.tile_k2 else f"k{self.tile_k1}/{self.tile_k2}"
        split = f" ks{self.ksplit}" if self.ksplit > 1 else ""
        return f"{self.source[0].upper()} bm{self.block_m} {stages} {self.stage2_mode} {k}{split}"

    def unfit(self, model_dim: int, inter_dim: int) -> str:
        """Return why a kernel does not support a layer of these sizes, which is not whole tiles; None if it does."""
        for stage, name, columns, k in ((1, self.stage1, inter_dim, model_dim), (2, self.stage2, model_dim, inter_dim)):
            tile = ck_tile(name)
            if tile is not None and (columns % tile[0] or k % tile[1]):
                return (
                    f"stage {stage}, {name}, needs multiples of {tile[0]} columns and of {tile[1]} in K, "
                    f"the layer has {columns} and {k}"
                )
        return ""

    def same_kernel(self, other: KernelChoice) -> bool:
        """Return whether both run the same code: then bits differ only where the kernel does not repeat its own.

        Names are compared whole: a suffix that should only schedule has been numerically wrong (aiter #3933).
        """
        return self._arithmetic() == other._arithmetic()

    def _arithmetic(self) -> tuple[int | str, ...]:
        return (
            self.block_m,
            max(self.ksplit, 1),
            self.run_1stage,
            self.stage1,
            self.stage2,
            self.stage2_mode,
            self.tile_k1,
            self.tile_k2,
        )


class Overrides(msgspec.Struct, frozen=True, kw_only=True):
    """Changes of aiter's choice by the environment: AITER_KSPLIT, AITER_BYPASS_TUNE_CONFIG."""

    ksplit: int = 0
    """Parts of K without a tuned row, unless 0; -1 also removes the split of tuned rows."""
    bypass_tuned: bool = False
    """Tuned rows are ignored."""


class KernelSelector(msgspec.Struct, frozen=True, kw_only=True):
    """Chooses kernels for one layer on one kind of device."""

    layer: LayerKey
    tuned: tuple[TunedRow, ...] = ()
    """The table rows that match the layer, one per bucket."""
    rules: BucketRules = CURRENT
    overrides: Overrides = Overrides()
    """Used where the release reads them."""

    def choose(self, rows: int) -> KernelChoice:
        """Return the kernel for `rows` rows (aiter v0.1.20, get_2stage_cfgs)."""
        bucket = padded_rows(rows, self.rules)
        row = self.tuned_row(bucket)
        if row is None:
            return self._heuristic(rows, bucket)
        choice = _from_table(rows, bucket, row)
        unsplit = self.rules.unsplit_tuned and self.overrides.ksplit == -1
        return msgspec.structs.replace(choice, ksplit=named_split(row.kernel_name1)) if unsplit else choice

    def tuned_row(self, bucket: int) -> TunedRow | None:
        """Return the tuned row for `bucket`; None if there is none, or if tuned rows are ignored."""
        if self.overrides.bypass_tuned and self.rules.reads_overrides:
            return None
        by_bucket = {row.bucket: row for row in reversed(self.tuned)}
        if bucket in by_bucket or not self.rules.tier_fallback:
            return by_bucket.get(bucket)
        lower = [tier for tier in self.rules.tiers if tier < bucket]
        return next((by_bucket[tier] for tier in reversed(lower) if tier in by_bucket), None)

    def _heuristic(self, rows: int, bucket: int) -> KernelChoice:
        if runs_one_stage(bucket, self.layer, self.rules):
            return KernelChoice(
                rows=rows,
                bucket=bucket,
                source="heuristic",
                block_m=ONE_STAGE_BLOCK_M,
                ksplit=0,
                run_1stage=True,
                stage1=f"asm_1stage_bm{ONE_STAGE_BLOCK_M}",
                stage2="",
                stage2_mode="atomic",
                tile_k1=DEFAULT_TILE_K,
                tile_k2=DEFAULT_TILE_K,
            )
        block_m = block_rows(bucket, self.layer, self.rules)
        stage1 = default_stage(1, block_m, self.layer, self.rules)
        stage2 = default_stage(2, block_m, self.layer, self.rules)
        return KernelChoice(
            rows=rows,
            bucket=bucket,
            source="heuristic",
            block_m=block_m,
            ksplit=self._split(bucket),
            run_1stage=False,
            stage1=stage1.name,
            stage2=stage2.name,
            stage2_mode="atomic",
            tile_k1=stage1.tile_k,
            tile_k2=stage2.tile_k,
        )

    def _split(self, bucket: int) -> int:
        """Return the parts of K without a tuned row (aiter v0.1.20, get_ksplit); bf16 kernels have none."""
        asked = self.overrides.ksplit if self.rules.reads_overrides and self.layer.quant != "bf16" else 0
        return asked or split_parts(bucket, self.layer, self.rules)


def _from_table(rows: int, bucket: int, row: TunedRow) -> KernelChoice:
    stage2 = "" if row.run_1stage else row.kernel_name2 or f"unnamed_stage2_bm{row.block_m}"
    return KernelChoice(
        rows=rows,
        bucket=bucket,
        source="tuned",
        block_m=row.block_m,
        ksplit=row.ksplit if row.ksplit > 1 else named_split(row.kernel_name1),
        run_1stage=row.run_1stage,
        stage1=row.kernel_name1,
        stage2=stage2,
        stage2_mode=stage2_mode(stage2),
        tile_k1=tile_k(row.kernel_name1),
        tile_k2=tile_k(stage2),
    )
