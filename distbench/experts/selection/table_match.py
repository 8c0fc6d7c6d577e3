"""Matches of a key in tuned tables: their number, the nearest row if there is none, and unreachable rows."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from distbench.experts.selection.releases import BucketRules, padded_rows
from distbench.experts.selection.tuned_table import TunedKey, parse_tuned_rows, read_table, row_keys

_EVERY_BUCKET_FROM = 1 << 20


class TableMatch(msgspec.Struct, frozen=True, kw_only=True):
    """One table: its rows, those that match the key, and their buckets that no row count reaches.

    `nearest` lists the columns in which the closest row differs; empty if a row matches.
    """

    path: str
    rows: int
    matching: int
    nearest: str
    unreached: list[int]


def match_tables(paths: Sequence[str], key: TunedKey, rules: BucketRules) -> list[TableMatch]:
    """Return the matches in each table.

    Raises:
        InvalidCase: a table cannot be read.
    """
    return [_match(path, read_table(path), key, rules) for path in paths]


def reachable_buckets(rules: BucketRules) -> frozenset[int]:
    """All buckets of a release."""
    counts = {1 << power for power in range(rules.tiers[0].bit_length())} | set(rules.tiers) | {_EVERY_BUCKET_FROM}
    return frozenset(padded_rows(rows, rules) for rows in counts)


def answers(bucket: int, rules: BucketRules) -> bool:
    """Whether some row count uses a tuned row of `bucket`."""
    return bucket in reachable_buckets(rules)


def _match(path: str, content: bytes, key: TunedKey, rules: BucketRules) -> TableMatch:
    keys = row_keys(content, path)
    matching = parse_tuned_rows(content, path, key)
    return TableMatch(
        path=path,
        rows=len(keys),
        matching=len(matching),
        nearest="" if matching else _nearest([one for one, _ in keys], key),
        unreached=sorted(row.bucket for row in matching if not answers(row.bucket, rules)),
    )


def _nearest(keys: Sequence[TunedKey], key: TunedKey) -> str:
    differences = sorted((_difference(one, key) for one in dict.fromkeys(keys)), key=len)
    return ", ".join(differences[0]) if differences else ""


def _difference(row: TunedKey, key: TunedKey) -> list[str]:
    """Columns in which a row differs from the key, with the row's values."""
    found = []
    for name in TunedKey.__struct_fields__:
        there, wanted = getattr(row, name), getattr(key, name)
        if wanted is not None and there is not None and there != wanted:
            found.append(f"{name} {there}")
    return found
