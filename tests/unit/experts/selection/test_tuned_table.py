from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench.errors import InvalidCase
from distbench.experts.selection.heuristics import LayerKey
from distbench.experts.selection.releases import BUCKET_RULES
from distbench.experts.selection.tuned_table import (
    REQUIRED_COLUMNS,
    TunedKey,
    TunedRow,
    load_tuned_rows,
    parse_tuned_rows,
)

DATA = Path(__file__).parents[3] / "data"
KEY = TunedKey(cu_num=304, model_dim=256, inter_dim=128, expert=4, topk=3)
VALUES = {
    "gfx": "gfx942",
    "cu_num": "304",
    "token": "8",
    "model_dim": "256",
    "inter_dim": "128",
    "expert": "4",
    "topk": "3",
    "act_type": "ActivationType.Silu",
    "dtype": "torch.bfloat16",
    "q_dtype_a": "torch.bfloat16",
    "q_dtype_w": "torch.bfloat16",
    "q_type": "QuantType.No",
    "use_g1u1": "1",
    "doweight_stage1": "0",
    "block_m": "64",
    "ksplit": "2",
    "us1": "1.5",
    "kernelName1": "first",
    "us2": "2.5",
    "kernelName2": "second",
    "us": "4.0",
    "run_1stage": "0",
    "_tag": "",
}
ROW = TunedRow(
    bucket=8,
    block_m=64,
    ksplit=2,
    run_1stage=False,
    kernel_name1="first",
    kernel_name2="second",
    us1=1.5,
    us2=2.5,
    us=4.0,
)


def table(*rows: dict[str, str], without: tuple[str, ...] = (), add: tuple[str, ...] = ()) -> bytes:
    columns = [column for column in (*VALUES, *add) if column not in without]
    lines = [",".join(columns)] + [",".join((VALUES | row).get(column, "") for column in columns) for row in rows]
    return ("\n".join(lines) + "\n").encode()


def read(*rows: dict[str, str], key: TunedKey = KEY, **layout: Any) -> tuple[TunedRow, ...]:
    return parse_tuned_rows(table(*rows, **layout), "table.csv", key)


def changed(**changes: Any) -> TunedRow:
    return msgspec.structs.replace(ROW, **changes)


def test_every_field_of_a_tuned_row_is_parsed() -> None:
    assert read({}) == (ROW,)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("gfx", "gfx950"),
        ("cu_num", "256"),
        ("model_dim", "512"),
        ("inter_dim", "256"),
        ("expert", "16"),
        ("topk", "4"),
        ("dtype", "torch.float16"),
        ("q_dtype_a", "torch.float8_e4m3fnuz"),
        ("q_dtype_w", "torch.float8_e4m3fnuz"),
        ("q_type", "QuantType.per_1x128"),
        ("use_g1u1", "0"),
        ("doweight_stage1", "1"),
    ],
)
def test_row_of_another_layer_does_not_match(column: str, value: str) -> None:
    key = msgspec.structs.replace(KEY, gfx="gfx942")
    assert read({}, key=key) == (ROW,)
    assert read({column: value}, key=key) == ()


def test_activation_is_compared_only_if_the_key_has_one() -> None:
    gelu = {"act_type": "ActivationType.Gelu", "block_m": "16"}
    assert read(gelu, {}) == (changed(block_m=16),)
    assert read(gelu, {}, key=msgspec.structs.replace(KEY, act_type="ActivationType.Silu")) == (ROW,)


def test_first_row_of_a_bucket_applies() -> None:
    assert read({}, {"block_m": "16"}, {"token": "4"}) == (ROW, changed(bucket=4))


def test_flydsl_fallback_rows_are_dropped_and_other_tags_kept() -> None:
    assert read({"_tag": "flydsl_fallback", "block_m": "16"}, {}) == (ROW,)
    assert read({"_tag": "exact-m4096-a"}) == (ROW,)


@pytest.mark.parametrize("gfx", ["", "0", "0.0", "nan", "None"])
def test_missing_architecture_is_inferred_from_the_compute_units(gfx: str) -> None:
    on_942, on_950 = (msgspec.structs.replace(KEY, gfx=name) for name in ("gfx942", "gfx950"))
    assert read({"gfx": gfx}, key=on_942) == (ROW,)
    assert read({"gfx": gfx}, key=on_950) == ()
    assert read({"gfx": gfx}) == (ROW,)
    unknown = msgspec.structs.replace(on_950, cu_num=64)
    assert read({"gfx": gfx, "cu_num": "64"}, key=unknown) == (ROW,)


def test_tables_of_old_releases_without_newer_columns_are_parsed() -> None:
    oldest = ("gfx", "_tag", "run_1stage", "us")
    assert read({"total_us": "9.5"}, without=oldest, add=("total_us",)) == (changed(us=9.5),)
    assert read({}, without=(*oldest, "us1", "us2")) == (changed(us=None, us1=None, us2=None),)
    assert read({}, without=oldest, key=msgspec.structs.replace(KEY, gfx="gfx950")) == ()


def test_columns_are_matched_by_name_in_any_order() -> None:
    columns = [*reversed(VALUES), "flat"]
    lines = [",".join(columns), ",".join((VALUES | {"flat": "49.07"})[column] for column in columns)]
    assert parse_tuned_rows("\r\n".join(lines).encode("utf-8-sig"), "table.csv", KEY) == (ROW,)


def test_first_of_two_columns_with_one_name_applies() -> None:
    content = table({}).decode().splitlines()
    doubled = f"{content[0]},block_m\n{content[1]},16\n"
    assert parse_tuned_rows(doubled.encode(), "table.csv", KEY) == (ROW,)


def test_short_row_has_empty_last_cells_and_blank_lines_are_skipped() -> None:
    content = table({}).decode()
    assert content.endswith(",4.0,0,\n")
    short = content.replace(",4.0,0,\n", "\n\n,,\n")
    assert parse_tuned_rows(short.encode(), "table.csv", KEY) == (changed(us=None),)


@pytest.mark.parametrize("value", ["1", "419", "1.0", "True", " 1 "])
def test_nonzero_run_1stage_is_one_stage(value: str) -> None:
    found = read({"run_1stage": value, "kernelName2": "Null"})
    assert found == (changed(run_1stage=True, kernel_name2="Null"),)


@pytest.mark.parametrize("value", ["0", "0.0", "False", "", "nan"])
def test_zero_or_empty_run_1stage_is_two_stage(value: str) -> None:
    assert read({"run_1stage": value}) == (ROW,)


@pytest.mark.parametrize("value", ["", "nan", "NaN", "None", "Null", "null", "NULL", "NA", "N/A"])
def test_time_cell_that_pandas_reads_as_missing_is_no_time(value: str) -> None:
    assert read({"us1": value}) == (changed(us1=None),)


@pytest.mark.parametrize(("value", "us"), [("1e2", 100.0), ("-1", -1.0), (".5", 0.5), (" 7 ", 7.0)])
def test_time_cell_is_parsed_to_microseconds(value: str, us: float) -> None:
    assert read({"us1": value}) == (changed(us1=us),)


def test_integer_written_as_a_decimal_is_parsed() -> None:
    assert read({"block_m": "64.0", "ksplit": "2.", "cu_num": "304.0", "use_g1u1": "True"}) == (ROW,)


@pytest.mark.parametrize(
    ("column", "value", "allowed"),
    [
        ("token", "abc", "a whole number from 1 up"),
        ("token", "0", "a whole number from 1 up"),
        ("token", "1e3", "a whole number from 1 up"),
        ("cu_num", "", "a whole number from 1 up"),
        ("cu_num", "0", "a whole number from 1 up"),
        ("model_dim", "-1", "a whole number from 0 up"),
        ("inter_dim", "128.5", "a whole number from 0 up"),
        ("expert", "1_0", "a whole number from 0 up"),
        ("topk", "٣", "a whole number from 0 up"),
        ("use_g1u1", "yes", "a whole number from 0 up"),
        ("doweight_stage1", "", "a whole number from 0 up"),
        ("block_m", "0", "a whole number from 1 up"),
        ("block_m", "9" * 19, "a whole number from 1 up"),
        ("ksplit", "-2", "a whole number from 0 up"),
        ("run_1stage", "x", "a whole number from 0 up"),
        ("kernelName1", "", "the name of a kernel"),
        ("kernelName2", "Null", "the name of a kernel"),
        ("us1", "fast", "a number of microseconds"),
        ("us2", "inf", "a number of microseconds"),
        ("us", "1e999", "a number of microseconds"),
        ("us", "1_0", "a number of microseconds"),
    ],
)
def test_invalid_cell_is_refused_with_file_line_column_and_value(column: str, value: str, allowed: str) -> None:
    with pytest.raises(InvalidCase) as refusal:
        read({}, {"token": "4", column: value})
    message = str(refusal.value)
    assert message.startswith(f"kernel table 'table.csv', line 3: column {column} is {value!r}; allowed is {allowed}")
    assert len(message.splitlines()) == 1


def test_rows_of_other_layers_are_checked_in_key_columns_only() -> None:
    assert read({"topk": "7", "block_m": "abc", "us": "abc", "kernelName1": ""}, {}) == (ROW,)
    with pytest.raises(InvalidCase, match="line 2: column expert"):
        read({"topk": "7", "expert": "abc"}, {})


@pytest.mark.parametrize("column", REQUIRED_COLUMNS)
def test_missing_column_is_refused_with_its_name(column: str) -> None:
    with pytest.raises(InvalidCase, match=f"'table.csv', line 1: column {column} is missing"):
        read({}, without=(column,))


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", b" , ,\n"])
def test_empty_tuned_table_is_refused(content: bytes) -> None:
    with pytest.raises(InvalidCase, match=r"'table\.csv', line 1: is empty"):
        parse_tuned_rows(content, "table.csv", KEY)


def test_table_with_a_header_only_has_no_rows() -> None:
    assert read() == ()


def test_row_with_too_many_cells_is_refused() -> None:
    with pytest.raises(InvalidCase, match=r"line 2: has 24 cells, the last 'odd'; allowed are the 23"):
        parse_tuned_rows(table({}).rstrip() + b",odd\n", "table.csv", KEY)


def test_bytes_that_are_not_utf8_are_refused_with_line_and_value() -> None:
    with pytest.raises(InvalidCase, match=r"'table\.csv', line 2: byte 0xff is not UTF-8"):
        parse_tuned_rows(table({"_tag": "?"}).replace(b"?", b"\xff"), "table.csv", KEY)


def test_csv_error_is_refused_with_its_line() -> None:
    with pytest.raises(InvalidCase, match="line 2: field larger than field limit"):
        parse_tuned_rows(table({"_tag": "x" * 200_000}), "table.csv", KEY)


def test_long_invalid_cell_is_truncated_in_the_message() -> None:
    with pytest.raises(InvalidCase) as refusal:
        read({"token": "x" * 5000})
    assert len(str(refusal.value)) < 250


@pytest.mark.parametrize("name", ["none.csv", ".", "a\0b", "x" * 5000, "line\nbreak"])
def test_unreadable_table_is_refused_in_one_line(tmp_path: Path, name: str) -> None:
    with pytest.raises(InvalidCase, match=r"kernel table '.*': cannot be read \(.+\); give") as refusal:
        load_tuned_rows(f"{tmp_path}/{name}", KEY)
    assert len(str(refusal.value).splitlines()) == 1


def test_refusal_of_an_unreadable_table_quotes_the_system_error(tmp_path: Path) -> None:
    with pytest.raises(InvalidCase, match=r"none\.csv': cannot be read \(No such file or directory\)"):
        load_tuned_rows(tmp_path / "none.csv", KEY)
    with pytest.raises(InvalidCase, match=r"cannot be read \(not a path\)"):
        load_tuned_rows("a\0b", KEY)


def test_table_file_is_read_and_named_as_its_source(tmp_path: Path) -> None:
    file = tmp_path / "tuned_fmoe.csv"
    file.write_bytes(table({}))
    assert load_tuned_rows(file, KEY) == load_tuned_rows(str(file), KEY) == (ROW,)
    file.write_bytes(b"token\n")
    with pytest.raises(InvalidCase, match=r"tuned_fmoe\.csv', line 1: column cu_num"):
        load_tuned_rows(file, KEY)


@given(st.binary() | st.text().map(str.encode))
def test_any_bytes_are_parsed_as_a_table_or_refused(content: bytes) -> None:
    _read_or_refuse(content)


@given(rows=st.lists(st.dictionaries(st.sampled_from(list(VALUES)), st.text()), max_size=3))
def test_any_cells_are_parsed_as_rows_or_refused(rows: list[dict[str, str]]) -> None:
    content = "\n".join([",".join(VALUES), *(",".join((VALUES | row).values()) for row in rows)])
    _read_or_refuse(content.encode("utf-8", "surrogatepass"))


@given(start=st.integers(0, 900), length=st.integers(0, 40), new=st.binary(max_size=8) | st.sampled_from([b'"', b"\n"]))
def test_damaged_real_table_is_parsed_or_refused(start: int, length: int, new: bytes) -> None:
    content = (DATA / "splitk.csv").read_bytes()
    _read_or_refuse(content[:start] + new + content[start + length :])


def _read_or_refuse(content: bytes) -> None:
    try:
        rows = parse_tuned_rows(content, "table.csv", KEY)
    except InvalidCase as error:
        rows, refusal = (), str(error)
    else:
        refusal = "kernel table 'table.csv', line 1: none"
    assert refusal.startswith("kernel table 'table.csv', line ")
    assert len(refusal.splitlines()) == 1
    assert len({row.bucket for row in rows}) == len(rows)


LAYER = LayerKey(num_local_experts=4, topk=4, model_dim=256, inter_dim=128)


def test_key_of_a_bf16_layer_has_its_types() -> None:
    assert TunedKey.for_layer(LAYER) == msgspec.structs.replace(KEY, gfx="gfx942")


def test_key_fields_follow_the_release() -> None:
    keys = {since: TunedKey.for_layer(LAYER, rules) for since, rules in BUCKET_RULES.items()}
    assert [keys[since].topk for since in ("0.1.5", "0.1.14", "0.1.16")] == [4, 4, 3]
    silu = "ActivationType.Silu"
    assert [keys[since].act_type for since in ("0.1.5", "0.1.12", "0.1.14", "0.1.16")] == [silu, silu, None, None]


@pytest.mark.parametrize(
    ("cu_count", "gfx", "dtype", "key_gfx"),
    [
        (304, None, "torch.float8_e4m3fnuz", "gfx942"),
        (256, None, "torch.float8_e4m3fn", "gfx950"),
        (256, "gfx1250", "torch.float8_e4m3fn", "gfx1250"),
        (80, None, "torch.float8_e4m3fnuz", "gfx942"),
        (64, None, "torch.float8_e4m3fnuz", None),
    ],
)
def test_key_of_an_fp8_layer_has_its_types(cu_count: int, gfx: str | None, dtype: str, key_gfx: str | None) -> None:
    key = TunedKey.for_layer(msgspec.structs.replace(LAYER, quant="fp8", cu_count=cu_count, gfx=gfx))
    assert (key.q_dtype_a, key.q_dtype_w, key.dtype, key.q_type) == (
        dtype,
        dtype,
        "torch.bfloat16",
        "QuantType.per_1x128",
    )
    assert (key.gfx, key.cu_num) == (key_gfx, cu_count)
