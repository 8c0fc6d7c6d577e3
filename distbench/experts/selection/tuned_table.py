"""aiter's tuned table: one CSV row per shape and bucket, with its fastest kernels.

Columns are found by name, so that the tables of all releases since 0.1.5 can be read: `gfx`, `run_1stage` and `_tag`
came later, and `us` was first named `total_us`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NoReturn

import msgspec

from distbench.case.aiter_env import table_paths
from distbench.errors import InvalidCase
from distbench.experts.selection.heuristics import ACTIVATIONS, LayerKey
from distbench.experts.selection.releases import CURRENT, BucketRules
from distbench.utils.amd_arch import GFX_BY_CU_COUNT, fp8_format

KEY_COLUMNS = (
    "cu_num",
    "token",
    "model_dim",
    "inter_dim",
    "expert",
    "topk",
    "act_type",
    "dtype",
    "q_dtype_a",
    "q_dtype_w",
    "q_type",
    "use_g1u1",
    "doweight_stage1",
)
REQUIRED_COLUMNS = (*KEY_COLUMNS, "block_m", "ksplit", "kernelName1", "kernelName2")

MISSING = frozenset({"", "nan", "NaN", "None", "Null", "null", "NULL", "NA", "N/A"})
"""Cells that mean nothing; aiter logs them verbatim as kernel names."""

_MISSING_GFX = MISSING | {"0", "0.0"}
_DROPPED_TAG = "flydsl_fallback"
_WHOLE = re.compile(r"([0-9]{1,18})(?:\.0*)?")
_DECIMAL = re.compile(r"[+-]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4})?")
_FLAGS = {"True": True, "False": False}
_LEFT_TO_THE_KERNEL = ("-1", "-1.0")


class TunedKey(msgspec.Struct, frozen=True, kw_only=True):
    """The columns that a row must match, except the bucket; None matches every value."""

    cu_num: int
    model_dim: int
    inter_dim: int
    expert: int
    """LOCAL experts."""
    topk: int
    dtype: str = "torch.bfloat16"
    q_dtype_a: str = "torch.bfloat16"
    q_dtype_w: str = "torch.bfloat16"
    q_type: str = "QuantType.No"
    use_g1u1: bool = True
    doweight_stage1: bool = False
    act_type: str | None = None
    gfx: str | None = None

    @classmethod
    def for_layer(cls, layer: LayerKey, rules: BucketRules = CURRENT) -> TunedKey:
        """Return the key under which aiter looks `layer` up (v0.1.20, get_2stage_cfgs)."""
        fp8 = f"torch.float8_{fp8_format(layer.arch)}"
        quantised = fp8 if layer.quant == "fp8" else "torch.bfloat16"
        return cls(
            cu_num=layer.cu_count,
            model_dim=layer.model_dim,
            inter_dim=layer.inter_dim,
            expert=layer.num_local_experts,
            topk=layer.lookup_topk(rules),
            q_dtype_a=quantised,
            q_dtype_w=quantised,
            q_type="QuantType.per_1x128" if layer.quant == "fp8" else "QuantType.No",
            act_type=f"ActivationType.{ACTIVATIONS[layer.activation]}" if rules.activation_matters else None,
            doweight_stage1=layer.doweight_stage1,
            gfx=layer.gfx or GFX_BY_CU_COUNT.get(layer.cu_count),
        )


class TunedRow(msgspec.Struct, frozen=True, kw_only=True):
    """A row's choice for its bucket; times in microseconds, None if the table has none."""

    bucket: int
    block_m: int
    ksplit: int
    run_1stage: bool
    kernel_name1: str
    kernel_name2: str
    """For a one-stage kernel the cell's text, unused; empty if a table leaves the kernel to the library."""
    us1: float | None = None
    us2: float | None = None
    us: float | None = None


def load_tuned_rows(named: str | Path, key: TunedKey) -> tuple[TunedRow, ...]:
    """Read the rows that match `key` from the CSV file `named`, or from several joined by colons; the first per bucket.

    Raises:
        InvalidCase: a file cannot be read or is not such a table; see `parse_tuned_rows`.
    """
    rows: dict[int, TunedRow] = {}
    for path in table_paths(str(named)):
        for row in parse_tuned_rows(read_table(path), path, key):
            rows.setdefault(row.bucket, row)
    return tuple(rows.values())


def read_table(path: str) -> bytes:
    """Return the bytes of a table.

    Raises:
        InvalidCase: the file cannot be read.
    """
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not a path"
        message = f"kernel table {path!r}: cannot be read ({reason}); give a readable file in tuned_fmoe format"
        raise InvalidCase(message) from error


def parse_tuned_rows(content: bytes, source: str, key: TunedKey) -> tuple[TunedRow, ...]:
    """Return the rows of the table `content` that match `key`; messages call it `source`.

    The first row of a bucket counts; rows tagged flydsl_fallback never do (aiter v0.1.20, get_cfg_2stages). The columns
    that identify a row are checked in all rows, the others in matching rows.

    Raises:
        InvalidCase: not UTF-8, not a table, a missing column, or a value that is not allowed.
    """
    rows: dict[int, TunedRow] = {}
    for record in _records(content, source):
        if record.text("_tag") != _DROPPED_TAG and _matches(record, key):
            row = _row(record)
            rows.setdefault(row.bucket, row)
    return tuple(rows.values())


def row_keys(content: bytes, source: str) -> list[tuple[TunedKey, int]]:
    """Return key and bucket of every row of the table `content`, in order; messages call it `source`.

    Raises:
        InvalidCase: as `parse_tuned_rows`.
    """
    return [(_key(record), record.whole("token", 1)) for record in _records(content, source)]


class _Record:
    """One line of the table: its cells by column, and errors that name the place of a bad cell."""

    def __init__(self, source: str, line: int, cells: dict[str, str]) -> None:
        self._where = f"kernel table {source!r}, line {line}"
        self._cells = cells

    def text(self, column: str) -> str:
        return self._cells.get(column, "")

    def refuse(self, column: str, allowed: str) -> NoReturn:
        message = f"{self._where}: column {column} is {self.text(column)!r:.80}; allowed is {allowed}"
        raise InvalidCase(message)

    def whole(self, column: str, least: int = 0) -> int:
        match = _WHOLE.fullmatch(self.text(column).strip())
        if match is None or int(match[1]) < least:
            self.refuse(column, f"a whole number from {least} up")
        return int(match[1])

    def split(self) -> int:
        """Parts of K; -1 in a table leaves them to the kernel."""
        return -1 if self.text("ksplit").strip() in _LEFT_TO_THE_KERNEL else self.whole("ksplit")

    def flag(self, column: str) -> bool:
        """Any number except 0 is true, as in aiter: a released table has a row with run_1stage 419."""
        value = _FLAGS.get(self.text(column).strip())
        return bool(self.whole(column)) if value is None else value

    def microseconds(self, column: str) -> float | None:
        text = self.text(column).strip()
        if text in MISSING:
            return None
        if _DECIMAL.fullmatch(text) is None or not math.isfinite(float(text)):
            self.refuse(column, "a number of microseconds, or nothing")
        return float(text)

    def name_or_nothing(self, column: str) -> str:
        return self.kernel(column) if self.text(column).strip() else ""

    def kernel(self, column: str) -> str:
        name = self.text(column)
        if name in MISSING:
            self.refuse(column, "the name of a kernel")
        return name


def _key(record: _Record) -> TunedKey:
    cu_num, gfx = record.whole("cu_num", 1), record.text("gfx")
    return TunedKey(
        cu_num=cu_num,
        model_dim=record.whole("model_dim"),
        inter_dim=record.whole("inter_dim"),
        expert=record.whole("expert"),
        topk=record.whole("topk"),
        dtype=record.text("dtype"),
        q_dtype_a=record.text("q_dtype_a"),
        q_dtype_w=record.text("q_dtype_w"),
        q_type=record.text("q_type"),
        act_type=record.text("act_type"),
        use_g1u1=record.flag("use_g1u1"),
        doweight_stage1=record.flag("doweight_stage1"),
        gfx=(GFX_BY_CU_COUNT.get(cu_num) if gfx in _MISSING_GFX else gfx),
    )


def _records(content: bytes, source: str) -> Iterator[_Record]:
    lines = _lines(_decoded(content, source), source)
    line, header = next(lines, (1, []))
    if not header:
        message = f"kernel table {source!r}, line 1: is empty; allowed is a header and rows in tuned_fmoe format"
        raise InvalidCase(message)
    for column in REQUIRED_COLUMNS:
        if column not in header:
            message = (
                f"kernel table {source!r}, line {line}: column {column} is missing, the header is"
                f" {','.join(header)!r:.200}; required are {', '.join(REQUIRED_COLUMNS)}"
            )
            raise InvalidCase(message)
    for line, cells in lines:
        if len(cells) > len(header):
            message = (
                f"kernel table {source!r}, line {line}: has {len(cells)} cells, the last {cells[-1]!r:.80};"
                f" allowed are the {len(header)} of the header"
            )
            raise InvalidCase(message)
        # Reversed, so that the first of two columns with one name counts, as in pandas.
        yield _Record(source, line, dict(reversed(list(zip(header, cells, strict=False)))))


def _decoded(content: bytes, source: str) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        message = (
            f"kernel table {source!r}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8;"
            " allowed is a CSV file in UTF-8"
        )
        raise InvalidCase(message) from error


def _lines(text: str, source: str) -> Iterator[tuple[int, list[str]]]:
    import csv  # noqa: PLC0415 - most ranks never read a table
    import io  # noqa: PLC0415

    reader = csv.reader(io.StringIO(text, newline=""))
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as error:
        message = f"kernel table {source!r}, line {reader.line_num}: {error}; allowed is a CSV file"
        raise InvalidCase(message) from error


def _matches(record: _Record, key: TunedKey) -> bool:
    record.whole("token", 1)
    row = _key(record)
    return all(
        getattr(key, name) is None or getattr(row, name) == getattr(key, name)
        for name in TunedKey.__struct_fields__
        if name != "gfx"
    ) and (row.gfx is None or key.gfx in (None, row.gfx))


def _row(record: _Record) -> TunedRow:
    # run_1stage came with v0.1.6; a missing cell means no.
    one_stage = record.text("run_1stage") not in MISSING and record.flag("run_1stage")
    return TunedRow(
        bucket=record.whole("token", 1),
        block_m=record.whole("block_m", 1),
        ksplit=record.split(),
        run_1stage=one_stage,
        kernel_name1=record.kernel("kernelName1"),
        kernel_name2=record.text("kernelName2") if one_stage else record.name_or_nothing("kernelName2"),
        us1=record.microseconds("us1"),
        us2=record.microseconds("us2"),
        us=record.microseconds("us") if record.text("us") else record.microseconds("total_us"),
    )
