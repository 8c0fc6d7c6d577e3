"""Tables of tuned kernels: JSON, one file per device and layer; some ship with distbench."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Literal

import msgspec

from distbench.case.spec import Case
from distbench.errors import InvalidCase
from distbench.experts.selection.releases import padded_rows
from distbench.experts.triton.config import ConfigSelector, LayerShape, Quant, TableRow
from distbench.utils.text import one_line

SCHEMA = "distbench.triton-table/1"
_SHIPPED = Path(__file__).with_name("tables")


class Table(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The fastest kernels of one device for one layer. The key is as in aiter's tables: LOCAL experts.

    `num_experts` is the routing it was tuned with: the rows of one rank of num_experts / num_local_experts, routed
    uniformly.
    """

    schema: Literal["distbench.triton-table/1"] = "distbench.triton-table/1"
    device: str
    num_local_experts: int
    hidden_size: int
    intermediate_size: int
    topk: int
    quant: Quant
    num_experts: int
    versions: dict[str, str]
    rows: list[TableRow] = []

    @property
    def file_name(self) -> str:
        """File name by which a table is found."""
        return _file_name(self.device, self)

    def answers(self, shape: LayerShape) -> bool:
        """Return whether the table is for this layer."""
        return _key(self) == _key(shape)


def shape_of(case: Case) -> LayerShape:
    """Return the layer shape of a case, the key of kernel choice."""
    return LayerShape(
        num_experts=case.placed_experts,
        num_local_experts=case.experts_per_rank,
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        topk=case.topk_slots,
        quant=case.dispatch_dtype,
    )


def load_table(path: str | Path) -> Table:
    """Read a table.

    Raises:
        InvalidCase: not readable, not of this schema, or a row is not of its bucket.

    """
    try:
        table = msgspec.json.decode(Path(path).read_bytes(), type=Table)
    except (OSError, ValueError, RecursionError) as error:
        message = f"kernel table {str(path)!r}: {one_line(error)}; give a table that `distbench tune` made ({SCHEMA})"
        raise InvalidCase(message) from error
    wrong = [row.bucket for row in table.rows if padded_rows(row.bucket) != row.bucket]
    if wrong:
        message = f"kernel table {str(path)!r}: {wrong[0]} is no bucket, it falls into {padded_rows(wrong[0])}"
        raise InvalidCase(message)
    return table


def encode_table(table: Table) -> bytes:
    """Return a table as JSON, one line per bucket."""
    head = msgspec.json.encode(msgspec.structs.replace(table, rows=[])).removesuffix(b"[]}")
    return head + b"[\n" + b",\n".join(msgspec.json.encode(row) for row in table.rows) + b"\n]}\n"


def selector_for(case: Case, device: str) -> ConfigSelector:
    """Return the kernel selector of a case on `device`: its kernel_table, a shipped table, or heuristics."""
    shape = shape_of(case)
    if case.kernel_table:
        return _selector(shape, load_table(case.kernel_table), case.kernel_table)
    return shipped_selector(shape, device)


@lru_cache
def shipped_selector(shape: LayerShape, device: str) -> ConfigSelector:
    """Return the selector of the shipped table for `device` and this layer, or of heuristics."""
    path = _SHIPPED / _file_name(device, shape)
    if not path.exists():
        return ConfigSelector(shape=shape)
    return _selector(shape, load_table(path), path.name)


def _selector(shape: LayerShape, table: Table, name: str) -> ConfigSelector:
    tuned = tuple(table.rows) if table.answers(shape) else ()
    return ConfigSelector(shape=shape, tuned=tuned, table=name, tuned_experts=table.num_experts)


def _key(layer: LayerShape | Table) -> tuple[int | str, ...]:
    return layer.num_local_experts, layer.hidden_size, layer.intermediate_size, layer.topk, layer.quant


def _file_name(device: str, layer: LayerShape | Table) -> str:
    name = re.sub("[^a-z0-9]+", "-", device.lower()).strip("-")
    local, hidden, inter, topk, quant = _key(layer)
    return f"{name}_e{local}_h{hidden}_i{inter}_k{topk}_{quant}.json"
