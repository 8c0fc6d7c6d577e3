"""Rows of aiter's tuned tables that some key reaches: a key of `distbench kernels`, or of a case of `run`."""

from __future__ import annotations

from pathlib import Path

import msgspec

from distbench.errors import InvalidCase
from distbench.experts.selection.heuristics import ACTIVATIONS
from distbench.experts.selection.lookup import QUANTS
from distbench.experts.selection.releases import BucketRules
from distbench.experts.selection.table_match import answers
from distbench.experts.selection.tuned_table import TunedKey, parse_tuned_rows, read_table, row_keys
from distbench.utils.amd_arch import GFX_BY_CU_COUNT
from distbench.utils.text import one_line

_RUN = ("bf16", "fp8")
_SILU = f"ActivationType.{ACTIVATIONS['silu']}"
_ACT_TYPES = (None, *(f"ActivationType.{name}" for name in ACTIVATIONS.values()))


class TableReach(msgspec.Struct, frozen=True, kw_only=True):
    """One table: its rows, those that a key of `kernels` and a case of `run` reaches, or the reason of a refusal.

    `unreached` counts the other rows by reason.
    """

    table: str
    rows: int = 0
    kernels: int = 0
    run: int = 0
    unreached: dict[str, int] = {}
    refused: str = ""

    def cells(self) -> tuple[str, ...]:
        """Texts of a table row: counts with their share of the rows."""
        reached = (f"{count} ({count / self.rows:.0%})" if self.rows else "0" for count in (self.kernels, self.run))
        told = ", ".join(f"{count} {reason}" for reason, count in self.unreached.items())
        return self.table, str(self.rows), *reached, told, self.refused


def survey_tables(folder: Path, rules: BucketRules) -> list[TableReach]:
    """Reach of each fmoe table below `folder`, by name; lists of shapes still to be tuned are left out."""
    paths = sorted(path for path in folder.rglob("*fmoe*.csv") if "untuned" not in path.name)
    return [_reach(path, rules) for path in paths]


def total_of(tables: list[TableReach]) -> TableReach:
    """Sum of several tables."""
    reasons: dict[str, int] = {}
    for table in tables:
        for reason, count in table.unreached.items():
            reasons[reason] = reasons.get(reason, 0) + count
    return TableReach(
        table=f"{len(tables)} tables",
        rows=sum(table.rows for table in tables),
        kernels=sum(table.kernels for table in tables),
        run=sum(table.run for table in tables),
        unreached=reasons,
        refused=f"{sum(bool(table.refused) for table in tables)} refused",
    )


def _reach(path: Path, rules: BucketRules) -> TableReach:
    try:
        content = read_table(str(path))
        keys = [key for key, _ in row_keys(content, str(path))]
        asked = dict.fromkeys(_asked(key, rules) for key in keys)
        found = {key: parse_tuned_rows(content, str(path), key) for key in asked if _names(key)}
    except InvalidCase as error:
        return TableReach(table=path.name, refused=one_line(error))
    reached = {key: sum(answers(row.bucket, rules) for row in rows) for key, rows in found.items()}
    kept = sum(map(len, found.values()))
    by_run = sum(count for key, count in reached.items() if _is_run(key))
    known = sum(bool(_names(key)) for key in keys)
    lost = {
        "with a key of no kind known": len(keys) - known,
        "behind an earlier row for the same key, or tagged as fall-back": known - kept,
        "for a bucket that the release does not have": kept - sum(reached.values()),
    }
    unreached = {reason: count for reason, count in lost.items() if count}
    return TableReach(table=path.name, rows=len(keys), kernels=sum(reached.values()), run=by_run, unreached=unreached)


def _asked(row: TunedKey, rules: BucketRules) -> TunedKey:
    """Key by which a release would reach the row."""
    return row if rules.activation_matters else msgspec.structs.replace(row, act_type=None)


def _names(key: TunedKey) -> list[str]:
    """Quantisations of the key; empty where `kernels` cannot express it."""
    arch = key.gfx or GFX_BY_CU_COUNT.get(key.cu_num, "")
    plain = key.dtype == "torch.bfloat16" and key.use_g1u1 and key.act_type in _ACT_TYPES
    return [
        name
        for name, quant in QUANTS.items()
        if plain and key.q_type == f"QuantType.{quant.q_type}" and (key.q_dtype_a, key.q_dtype_w) == quant.dtypes(arch)
    ]


def _is_run(key: TunedKey) -> bool:
    return key.act_type in (None, _SILU) and not key.doweight_stage1 and bool({*_names(key)} & {*_RUN})
