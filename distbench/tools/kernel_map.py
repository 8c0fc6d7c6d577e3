"""From row count to kernel, over all row counts: the effect of a limit on the kernel, on one release or on each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from distbench.experts.selection.choice import KernelChoice, KernelSelector, LayerKey, TunedKey
from distbench.experts.selection.lookup import Lookup
from distbench.experts.selection.releases import BUCKET_RULES, BucketRules, padded_rows
from distbench.experts.selection.table_match import TableMatch, match_tables
from distbench.experts.selection.tuned_table import load_tuned_rows

NODE = "node"
UNKNOWN: Literal["unknown"] = "unknown"
Effect = Literal["nothing", "same kernel", "other kernel", "ordered to atomic", "atomic to ordered", "unknown"]
_PLAIN = Lookup()


class Span(msgspec.Struct, frozen=True, kw_only=True):
    """The row counts `first` to `last` of one bucket, their kernel, and the effect of a limit there on a padded buffer.

    Times are those of the tuned table, in microseconds, None without a row. `ordered`: a token's routes are added in
    one order; an atomic sum of three routes or more may differ from run to run. Where no row matches, and the
    quantisation's heuristics are not known here, `source` and `limit_here` are UNKNOWN and the kernel is left out.
    """

    first: int
    last: int
    bucket: int
    source: str
    stages: int
    block_m: int
    ksplit: int
    stage1: str
    stage2: str
    ordered: bool
    us1: float | None
    us2: float | None
    us: float | None
    limit_here: Effect


class LimitEffect(msgspec.Struct, frozen=True, kw_only=True):
    """Effect of one limit on the padded buffer's kernel: on the given release, and by first release of each effect."""

    limit: int
    bucket: int
    effect: Effect
    by_release: dict[str, Effect]


class KernelMap(msgspec.Struct, frozen=True, kw_only=True):
    """The kernels of one layer on one device and release; `tables` are the files with tuned rows, `padded` is R.

    `cu_count_from` is the source of the layer's compute units: NODE, `default` where they are assumed, or the option
    that gave them.
    """

    release: str
    tables: list[str]
    layer: LayerKey
    cu_count_from: str = ""
    padded: int
    spans: list[Span]
    limits: list[LimitEffect]
    lookup: Lookup = _PLAIN
    key: TunedKey
    """The key by which the tables are searched."""
    matches: list[TableMatch]

    @property
    def matched(self) -> bool:
        """Whether a table has a row for the key."""
        return any(table.matching for table in self.matches)


def map_kernels(  # noqa: PLR0913 - all that decides a kernel
    layer: LayerKey,
    release: str,
    rules: BucketRules,
    tables: Sequence[str],
    padded: int,
    lookup: Lookup = _PLAIN,
) -> KernelMap:
    """Map of all row counts from 1 to `padded`, without limits.

    Raises:
        InvalidCase: a table cannot be read.

    """
    selector = make_table_selector(layer, rules, tables, lookup)
    baseline = _choice(selector, padded, lookup)
    spans = [_span(selector, (first, last), baseline, lookup) for first, last in _ranges(rules, padded)]
    key = lookup.key(layer, rules)
    return KernelMap(
        release=release,
        tables=list(tables),
        layer=layer,
        padded=padded,
        spans=spans,
        limits=[],
        lookup=lookup,
        key=key,
        matches=match_tables(tables, key, rules),
    )


def limit_effects(  # noqa: PLR0913 - all that decides a kernel
    layer: LayerKey,
    rules: BucketRules,
    tables: Sequence[str],
    padded: int,
    limits: Sequence[int],
    lookup: Lookup = _PLAIN,
) -> list[LimitEffect]:
    """Effect of each limit on a buffer of `padded` rows, under `rules` and under those of every release.

    All releases use the same tables, each with its own key.
    """
    if not limits:
        return []
    selector = make_table_selector(layer, rules, tables, lookup)
    others = {name: make_table_selector(layer, other, tables, lookup) for name, other in BUCKET_RULES.items()}
    return [
        LimitEffect(
            limit=limit,
            bucket=padded_rows(min(limit, padded), rules),
            effect=effect_of(selector, limit, padded, lookup),
            by_release={name: effect_of(other, limit, padded, lookup) for name, other in others.items()},
        )
        for limit in limits
    ]


def make_table_selector(
    layer: LayerKey, rules: BucketRules, tables: Sequence[str], lookup: Lookup = _PLAIN
) -> KernelSelector:
    """Selector by the rows of all `tables`; of two rows for one bucket the first counts."""
    key = lookup.key(layer, rules)
    tuned = tuple(row for path in tables for row in load_tuned_rows(path, key))
    return KernelSelector(layer=lookup.of(layer), tuned=tuned, rules=rules, overrides=lookup.overrides)


def effect_of(selector: KernelSelector, limit: int, padded: int, lookup: Lookup = _PLAIN) -> Effect:
    """Effect on the kernel of cutting `padded` rows to `limit`."""
    if limit >= padded:
        return "nothing"
    return _effect(_choice(selector, padded, lookup), _choice(selector, limit, lookup))


def _choice(selector: KernelSelector, rows: int, lookup: Lookup) -> KernelChoice | None:
    """Kernel for `rows` rows; None where requested tables have no row at all, or no kernel is known."""
    ignored = selector.overrides.bypass_tuned and selector.rules.reads_overrides
    if lookup.explicit and not selector.tuned and not ignored:
        return None
    tuned = selector.tuned_row(padded_rows(rows, selector.rules)) is not None
    return selector.choose(rows) if tuned or lookup.modelled else None


def _effect(before: KernelChoice | None, after: KernelChoice | None) -> Effect:
    if before is None or after is None:
        return UNKNOWN
    if before.same_kernel(after):
        return "same kernel"
    if before.stage2_mode == after.stage2_mode:
        return "other kernel"
    return "ordered to atomic" if after.stage2_mode == "atomic" else "atomic to ordered"


def _ranges(rules: BucketRules, padded: int) -> list[tuple[int, int]]:
    """First and last row count of each bucket up to `padded`."""
    powers = {(1 << power) + 1 for power in range((padded - 1).bit_length())}
    starts = sorted({1, *powers, *rules.tiers} & set(range(1, padded + 1)))
    selected = [start for start in starts if start == 1 or padded_rows(start, rules) != padded_rows(start - 1, rules)]
    return list(zip(selected, [start - 1 for start in selected[1:]] + [padded], strict=True))


def _span(selector: KernelSelector, rows: tuple[int, int], baseline: KernelChoice | None, lookup: Lookup) -> Span:
    first, last = rows
    bucket = padded_rows(first, selector.rules)
    choice, row = _choice(selector, first, lookup), selector.tuned_row(bucket)
    return Span(
        first=first,
        last=last,
        bucket=bucket,
        source=choice.source if choice else UNKNOWN,
        stages=0 if choice is None else 1 if choice.run_1stage else 2,
        block_m=choice.block_m if choice else 0,
        ksplit=choice.ksplit if choice else 0,
        stage1=choice.stage1 if choice else "",
        stage2=choice.stage2 if choice else "",
        ordered=choice is not None and choice.stage2_mode == "reduce",
        us1=row.us1 if row else None,
        us2=row.us2 if row else None,
        us=row.us if row else None,
        limit_here=_effect(baseline, choice),
    )
