"""Kernels by number of rows for the asked layer: as `distbench kernels` maps them."""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from distbench.case.aiter_env import table_paths
from distbench.case.spec import Case
from distbench.experts import make_selector, overrides_of
from distbench.experts.aiter.package import installed_release, installed_tables
from distbench.experts.selection.choice import KernelSelector, rules_for
from distbench.experts.selection.lookup import Lookup
from distbench.experts.selection.releases import BUCKET_RULES, padded_rows
from distbench.tools.kernel_map import UNKNOWN, Effect, Span, effect_of, make_table_selector, map_kernels


class RowsKernel(NamedTuple):
    """Kernel of a number of rows: its bucket, a label, how a token's routes are summed, and a tuned time or None.

    `effect` is that of a cut to these rows on the kernel of the whole buffer.
    """

    bucket: int
    label: str
    ordered: bool | None
    us: float | None
    effect: Effect


class Kernels:
    """Kernels of a layer for 1 to `capacity` rows, by the given or installed tables and the heuristics."""

    def __init__(self, case: Case) -> None:
        """Read the tables.

        Raises:
            InvalidCase: a table cannot be read, or the release is unknown.

        """
        release = case.aiter_version or installed_release()
        self.rules = rules_for(release)
        self.release = release or f"{next(reversed(BUCKET_RULES))} or later"
        self.tables = table_paths(case.kernel_table) or installed_tables()
        self.capacity = case.capacity
        self.lookup = Lookup(
            activation=case.activation,
            doweight_stage1=case.doweight_stage1,
            overrides=overrides_of(case),
            explicit=bool(case.kernel_table),
        )
        self.layer = make_selector(msgspec.structs.replace(case, kernel_table="")).layer
        self._selector: KernelSelector = make_table_selector(self.layer, self.rules, self.tables, self.lookup)
        found = map_kernels(self.layer, self.release, self.rules, self.tables, self.capacity, self.lookup)
        self.spans: list[Span] = found.spans
        self.matched = found.matched

    def of(self, limit: int) -> RowsKernel:
        """Kernel of a limit, which leaves no more rows than the buffer has."""
        rows = max(min(limit, self.capacity), 1)
        bucket = padded_rows(rows, self.rules)
        span = next(one for one in self.spans if one.first <= rows <= one.last)
        if span.source == UNKNOWN:
            return RowsKernel(bucket, "no tuned row", None, None, UNKNOWN)
        label = self._selector.choose(rows).label
        effect = effect_of(self._selector, limit, self.capacity, self.lookup)
        return RowsKernel(bucket, label, span.ordered, span.us, effect)

    def edges(self, least: int, most: int) -> list[int]:
        """Largest row counts of the buckets, from `least` up to `most`."""
        return [span.last for span in self.spans if least <= span.last <= most]

    def edge(self, rows: int) -> int:
        """Largest row count in the bucket of `rows`."""
        held = max(min(rows, self.capacity), 1)
        return next(span.last for span in self.spans if span.first <= held <= span.last)
