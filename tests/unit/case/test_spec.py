"""Cases: layers, validation, round trips, hashes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench.case.identity import case_hash
from distbench.case.presets import PRESETS
from distbench.case.resolve import Layer, load_case_file, resolve_case
from distbench.case.spec import FIELD_TYPES, Case
from distbench.errors import DistbenchError, InvalidCase


def resolve(ep_size: int | None = 4, **values: Any) -> Case:
    return resolve_case([Layer("test", values)], ep_size).case


def test_default_case_is_the_production_layer_on_eight_ranks() -> None:
    case = resolve(None)
    assert (case.ep_size, case.hidden_size, case.intermediate_size) == (8, 2048, 768)
    assert (case.num_experts, case.topk, case.capacity) == (128, 8, 32768)
    assert case.tokens == (16,) * 8


def test_first_layer_that_sets_a_key_wins_and_is_named_as_its_source() -> None:
    layers = [
        Layer("flag", {"seed": "7"}, strict=False),
        Layer("file", {"seed": 8, "limit": 64}),
        Layer("env:X", {"limit": 9}),
    ]
    resolved = resolve_case(layers, 8)
    assert (resolved.case.seed, resolved.case.limit) == (7, "64")
    assert (resolved.sources["seed"], resolved.sources["limit"]) == ("flag", "file")
    assert resolved.sources["hidden_size"] == "preset:qwen3-30b-a3b"
    assert resolved.sources["topk"] == "preset:qwen3-30b-a3b"
    assert resolved.sources["policy"] == "default"


@pytest.mark.parametrize(("prealloc", "capacity"), [(0, 512), (4, 4), (5, 8), (511, 512), (10**6, 512)])
def test_capacity_follows_prealloc_max_recv_tokens(prealloc: int, capacity: int) -> None:
    case = resolve(max_dispatch_tokens_per_rank=128, prealloc_max_recv_tokens=prealloc)
    assert case.capacity == capacity


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"tokns": 3}, r"unknown key 'tokns' \(did you mean tokens\?\); allowed are model"),
        ({"tokens": [1, 2]}, "2 numbers for 4 ranks"),
        ({"tokens": -1}, "tokens = -1"),
        ({"tokens": "16"}, "tokens = '16'"),
        ({"policy": "lax"}, "policy = 'lax': allowed are strict, unchecked, guard"),
        ({"num_experts": 10}, "not divisible by 4 ranks; use 8"),
        ({"topk": 200}, "topk = 200: above num_experts = 128"),
        ({"model": "gpt-9"}, "allowed are deepseek-v3"),
        ({"model": "custom"}, "model = custom: hidden_size, intermediate_size, num_experts, topk not given"),
        ({"model": "custom", "hidden_size": 64, "topk": 1}, "custom: intermediate_size, num_experts not given"),
        ({"seed": -1}, "seed = -1"),
        ({"seed": 1 << 70}, "seed = 1180591620717411303424"),
        ({"timeout": float("nan")}, "timeout = nan"),
        ({"hidden_size": 2050, "dispatch_dtype": "fp8"}, "multiple of 128"),
        ({"combine_quant": "fp8_blockwise"}, "collective returns expert rows as they are; use transport mori"),
        ({"kernel_table": "/nonexistent.csv"}, r"\(test\): cannot be read"),
        ({"kernel_table": "a\0b"}, "cannot be read"),
    ],
)
def test_invalid_value_is_refused_with_its_key(values: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidCase, match=message):
        resolve(**values)


@pytest.mark.parametrize("key", ["hidden_size", "intermediate_size", "num_experts", "topk"])
def test_model_with_an_overridden_dimension_is_custom(key: str) -> None:
    preset = resolve_case([Layer("file", {})], 4)
    other = resolve_case([Layer("file", {key: getattr(preset.case, key) * 2})], 4)
    assert other.case.model == "custom"
    assert other.sources["model"] == f"preset:qwen3-30b-a3b with another {key}"
    again = resolve_case([Layer("report", msgspec.to_builtins(other.case))], 4).case
    assert case_hash(again) == case_hash(other.case)


def test_model_keeps_its_name_if_given_dimensions_equal_its_own() -> None:
    preset = resolve().model
    assert resolve(hidden_size=2048, intermediate_size=768, num_experts=128, topk=8).model == preset != "custom"


def test_ep_size_that_differs_from_the_launched_ranks_is_refused() -> None:
    with pytest.raises(InvalidCase, match=r"ep_size = 3 .*the launch has 4 ranks"):
        resolve_case([Layer("file", {"ep_size": 3})], 4)


def test_kernel_table_digest_given_from_outside_is_ignored() -> None:
    assert resolve(kernel_table_sha256="00").kernel_table_sha256 == ""


@pytest.mark.parametrize("suffix", ["json", "toml"])
def test_case_survives_a_round_trip_through_json_and_toml(tmp_path: Path, suffix: str) -> None:
    case = resolve(tokens=[0, 1, 7, 33], limit="max-recv", dispatch_dtype="fp8", routing="zipf:1.2")
    file = tmp_path / f"case.{suffix}"
    file.write_bytes(getattr(msgspec, suffix).encode(case))
    again = resolve_case([load_case_file(str(file))], 4).case
    assert again == case
    assert case_hash(again) == case_hash(case)


@given(st.sampled_from(sorted(FIELD_TYPES)), st.integers(1, 9))
def test_changing_any_field_changes_the_hash_of_a_case(key: str, number: int) -> None:
    case = resolve()
    value = getattr(case, key)
    changed: Any = f"{value}x"
    if isinstance(value, bool):
        changed = not value
    elif isinstance(value, int | float):
        changed = value + number
    elif isinstance(value, tuple):
        changed = (*value, number)
    assert case_hash(msgspec.structs.replace(case, **{key: changed})) != case_hash(case)


def test_equal_cases_have_equal_hashes() -> None:
    assert case_hash(resolve(None)) == case_hash(resolve(None))
    assert len(case_hash(resolve(None))) == 64


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("case.toml", b"seed = ", "not valid TOML"),
        ("case.toml", b"\xff\xfe", "not valid TOML"),
        ("case.json", b"{", "not valid JSON"),
        ("case.json", b"[1]", "holds a list"),
        ("case.json", b"[" * 100_000, "not valid JSON"),
        ("case.yaml", b"", "neither .toml nor .json"),
    ],
)
def test_broken_case_file_is_refused_in_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(InvalidCase, match=message) as caught:
        load_case_file(str(file))
    assert "\n" not in str(caught.value)


def test_missing_case_file_is_refused() -> None:
    with pytest.raises(InvalidCase, match="cannot be read"):
        load_case_file("/nonexistent/case.toml")


values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=12), st.lists(st.integers(), max_size=4)
)


@given(st.dictionaries(st.sampled_from(sorted(FIELD_TYPES)) | st.text(max_size=8), values, max_size=4), st.booleans())
def test_any_table_of_values_gives_a_case_or_a_one_line_error(table: dict[str, Any], strict: bool) -> None:
    line = ""
    try:
        resolve_case([Layer("test", table, strict)], None)
    except DistbenchError as error:
        line = str(error)
    assert "\n" not in line


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_every_preset_resolves_to_a_case_on_eight_ranks(name: str) -> None:
    case = resolve(8, model=name)
    assert case.num_experts % 8 == 0
    assert case.topk <= case.num_experts
