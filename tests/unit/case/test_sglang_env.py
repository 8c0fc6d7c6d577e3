"""SGLang's variables: their effects, refused values, and names without effect."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest

from distbench.case.environment import read_environment
from distbench.case.resolve import FLAGS, Layer, resolve_case
from distbench.case.sglang_env import near_misses, recorded_environment
from distbench.case.sglang_releases import (
    COMBINE_DTYPE,
    DISPATCH_DTYPE,
    DISPATCH_TOKENS,
    EP_V2,
    FP4_DISPATCH,
    FP8_COMBINE,
    FP8_DISPATCH,
    LIMIT,
    PREALLOC,
    RECV_BOUND,
    SDMA,
    VARIABLES,
    reads,
    rules_of,
)
from distbench.errors import InvalidCase, Unsupported
from distbench.launcher.unused_variables import unused_variables
from tests.cases import tiny_case


def test_variables_set_keys_and_are_named_as_their_sources() -> None:
    environ = {LIMIT: "128", DISPATCH_TOKENS: "512", PREALLOC: "2048", RECV_BOUND: "true"}
    resolved = resolve_case(read_environment(environ), 8)
    case = resolved.case
    assert (case.limit, case.max_dispatch_tokens_per_rank, case.recv_bound) == ("128", 512, True)
    assert case.capacity == 2048
    assert resolved.sources["limit"] == f"env:{LIMIT}"


@pytest.mark.parametrize("text", ["0", ""])
def test_zero_turns_the_limit_off_and_unset_leaves_the_default(text: str) -> None:
    case = resolve_case(read_environment({LIMIT: text}), 8).case
    assert case.limit == ("off" if text else "sum32")


def test_recv_bound_alone_replaces_the_default_limit() -> None:
    resolved = resolve_case(read_environment({RECV_BOUND: "1"}), 8)
    assert resolved.case.limit == "off"
    assert resolved.sources["limit"] == f"env:{RECV_BOUND}"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        (LIMIT, "12k", "not a whole number; production would warn, fall back to 0 and cut nothing"),
        (LIMIT, "-1", "negative; production would take it as off"),
        (LIMIT, "1.5", "not a whole number"),
        (PREALLOC, "many", "size the buffer for the worst case"),
        (DISPATCH_TOKENS, "4096.0", "fall back to 4096"),
        (DISPATCH_TOKENS, "0", "no token could be sent"),
        (RECV_BOUND, "on", "allowed are true, 1, yes, y"),
        (DISPATCH_DTYPE, "nonsense", "allowed are auto, bf16, fp8, fp4, mxfp8; production would ignore it"),
        (DISPATCH_DTYPE, " fp8", "allowed are auto"),
        (COMBINE_DTYPE, "int8", "production would ignore it and take the type that goes with the weights"),
        (EP_V2, "on", "allowed are true, 1, yes, y"),
        ("AITER_KSPLIT", "four", "not a whole number; production would fail in aiter's first call"),
        ("AITER_BYPASS_TUNE_CONFIG", "true", "not a whole number"),
    ],
)
def test_value_that_production_would_ignore_is_refused(name: str, text: str, message: str) -> None:
    with pytest.raises(InvalidCase, match=message) as caught:
        read_environment({name: text})
    assert name in str(caught.value)


@pytest.mark.parametrize(
    "name",
    [
        "MORI_MOE_MAX_INPUT_TOKENS",
        "SGLANG_MORI_MOE_MAX_INPUT_TOKEN",
        "SGLANG_MORI_MAX_INPUT_TOKENS",
        "sglang_mori_moe_max_input_tokens",
        "MORI_RECV_BOUND",
        "SGLANG_MORI_PREALLOC_MAX_RECV_TOKEN",
    ],
)
def test_misspelled_variable_gives_a_warning(name: str) -> None:
    (warning,) = near_misses({name: "64"})
    assert name in warning
    assert "has no effect: production reads SGLANG_MORI_" in warning


def test_warning_of_a_misspelled_old_name_lists_the_releases_that_read_it() -> None:
    (warning,) = near_misses({"SGLANG_MORI_FP8_DISPATCH": "1"})
    assert "production reads SGLANG_MORI_FP8_DISP (SGLang 0.5.9 to 0.5.20); " in warning


@pytest.mark.parametrize(
    "name",
    [LIMIT, "MORI_SHMEM_HEAP_SIZE", "PATH", "MORI_RDMA_SL", "SGLANG_MORI_NO_PAD_MASK", "MORI_IO_POST_BATCH_SIZE"],
)
def test_known_and_unrelated_variables_give_no_warning(name: str) -> None:
    assert near_misses({name: "1"}) == []


def test_only_known_variables_are_recorded_in_a_report() -> None:
    environ = {LIMIT: "1", "AWS_SECRET_ACCESS_KEY": "x", "AITER_KSPLIT": "2", "HOME": "/"}
    assert recorded_environment(environ) == {LIMIT: "1", "AITER_KSPLIT": "2"}


def case_of(environ: dict[str, str], **flags: Any) -> Any:
    layers = [Layer(FLAGS, {"transport": "mori"} | flags, strict=False)]
    return resolve_case([*layers, *read_environment(environ, layers)], 8).case


@pytest.mark.parametrize(
    ("environ", "sglang", "key", "value"),
    [
        ({DISPATCH_DTYPE: "FP8"}, "", "dispatch_dtype", "fp8"),
        ({DISPATCH_DTYPE: "auto"}, "", "dispatch_dtype", "bf16"),
        ({DISPATCH_DTYPE: "fp8"}, "0.5.9", "dispatch_dtype", "bf16"),
        ({FP8_DISPATCH: "True"}, "0.5.9", "dispatch_dtype", "fp8"),
        ({FP8_DISPATCH: "True"}, "0.5.20", "dispatch_dtype", "fp8"),
        ({FP8_DISPATCH: "True"}, "0.5.20.post1", "dispatch_dtype", "fp8"),
        ({FP8_DISPATCH: "True"}, "0.5.21", "dispatch_dtype", "bf16"),
        ({FP8_DISPATCH: "yes"}, "0.5.20", "dispatch_dtype", "bf16"),
        ({FP8_DISPATCH: "True", DISPATCH_DTYPE: "bf16"}, "0.5.20", "dispatch_dtype", "bf16"),
        ({COMBINE_DTYPE: "FP8"}, "", "combine_quant", "fp8_blockwise"),
        ({COMBINE_DTYPE: "Fp8_Direct_Cast"}, "", "combine_quant", "fp8_direct_cast"),
        ({COMBINE_DTYPE: "fp8"}, "0.5.11", "combine_quant", "none"),
        ({FP8_COMBINE: "true"}, "0.5.11", "combine_quant", "fp8_direct_cast"),
        ({FP8_COMBINE: "true"}, "0.5.12", "combine_quant", "fp8_blockwise"),
        ({FP8_COMBINE: "true"}, "0.5.21", "combine_quant", "none"),
        ({FP8_COMBINE: "true", COMBINE_DTYPE: "bf16"}, "0.5.12", "combine_quant", "none"),
        ({SDMA: "True"}, "", "mori_kernel", "AsyncLL"),
        ({SDMA: "on"}, "", "mori_kernel", "auto"),
        ({SDMA: "yes"}, "", "mori_kernel", "auto"),
        ({SDMA: "1"}, "0.5.10", "mori_kernel", "auto"),
        ({LIMIT: "64"}, "0.5.10", "limit", "sum32"),
        ({RECV_BOUND: "1"}, "0.5.18", "recv_bound", False),
        ({RECV_BOUND: "1"}, "0.5.19", "recv_bound", True),
        ({EP_V2: "false"}, "", "mori_kernel", "auto"),
    ],
)
def test_a_variable_is_read_as_its_release_reads_it(
    environ: dict[str, str], sglang: str, key: str, value: object
) -> None:
    assert getattr(case_of(environ, sglang_version=sglang), key) == value


@pytest.mark.parametrize("environ", [{COMBINE_DTYPE: "fp8"}, {FP8_COMBINE: "true"}])
def test_combine_dtype_of_the_environment_is_ignored_by_the_collective_transport(environ: dict[str, str]) -> None:
    assert case_of(environ, sglang_version="0.5.12", transport="collective").combine_quant == "none"


def test_boolean_word_of_another_release_is_refused() -> None:
    with pytest.raises(InvalidCase, match="allowed are true, 1, false, 0"):
        case_of({RECV_BOUND: "yes"}, sglang_version="0.5.20")
    with pytest.raises(InvalidCase, match="allowed are auto, bf16, fp8, fp8_direct_cast;"):
        case_of({COMBINE_DTYPE: "fp4"}, sglang_version="0.5.15")


@pytest.mark.parametrize("version", ["0.5.8", "0.4.10", "newest"])
def test_release_without_the_mori_path_is_refused(version: str) -> None:
    with pytest.raises(InvalidCase, match=f"sglang_version = '{version}'"):
        case_of({}, sglang_version=version)


@pytest.mark.parametrize(
    ("environ", "sglang"),
    [
        ({DISPATCH_DTYPE: "fp4"}, ""),
        ({DISPATCH_DTYPE: "MXFP8"}, ""),
        ({FP4_DISPATCH: "1"}, "0.5.20"),
        ({EP_V2: "y"}, ""),
    ],
)
def test_variable_that_selects_an_unavailable_type_is_unsupported(environ: dict[str, str], sglang: str) -> None:
    with pytest.raises(Unsupported, match="env:SGLANG_MORI_"):
        case_of(environ, sglang_version=sglang)


def test_flag_overrides_an_unavailable_type_of_the_environment() -> None:
    assert case_of({DISPATCH_DTYPE: "fp4"}, dispatch_dtype="bf16").dispatch_dtype == "bf16"


def test_sglang_version_is_the_installed_release_unless_the_case_names_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.5.10.post1")
    assert case_of({FP8_DISPATCH: "1"}).sglang_version == "0.5.10.post1"
    assert case_of({FP8_DISPATCH: "1"}).dispatch_dtype == "fp8"
    assert case_of({FP8_DISPATCH: "1"}, sglang_version="0.5.23").dispatch_dtype == "bf16"
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.0.0.dev1+g123")
    assert not case_of({}).sglang_version


def test_misspelled_variable_beside_the_correct_one_gives_no_warning() -> None:
    environ = {"MORI_MOE_MAX_INPUT_TOKENS_DECODE": "2048"}
    assert len(near_misses(environ)) == 1
    assert near_misses(environ | {LIMIT: "2048"}) == []
    assert len(near_misses(environ | {LIMIT: " "})) == 1


def test_triton_experts_ignore_kernel_tables_of_aiter(tmp_path: Any) -> None:
    table = tmp_path / "tuned.csv"
    table.write_text("cu_num")
    environ = {"AITER_CONFIG_FMOE": str(table), "AITER_KSPLIT": "2"}
    assert case_of(environ).kernel_table == str(table)
    case = case_of(environ, experts="triton")
    assert (case.kernel_table, case.aiter_ksplit) == ("", 0)
    (line,) = unused_variables(environ, case, {})
    assert "experts triton have their own tables" in line


def test_several_kernel_tables_are_one_key_with_a_joint_digest(tmp_path: Any) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(f"token,only_{name}\n1,2\n")
    named = f"{tmp_path}/a:{tmp_path}/b"
    case = case_of({"AITER_CONFIG_FMOE": named})
    assert case.kernel_table == named
    assert case.kernel_table_sha256 not in ("", case_of({"AITER_CONFIG_FMOE": f"{tmp_path}/a"}).kernel_table_sha256)
    with pytest.raises(InvalidCase, match="missing"):
        case_of({"AITER_CONFIG_FMOE": f"{tmp_path}/a:{tmp_path}/missing"})


@pytest.mark.parametrize(
    ("environ", "values", "reason"),
    [
        ({"MORI_RDMA_TC": "96"}, {}, "this case does not run mori"),
        ({"MORI_RDMA_TC": "96"}, {"transport": "mori", "emulate": True}, "the stand-in of mori does not read it"),
        ({"MORI_RDMA_TC": "96"}, {"transport": "mori"}, ""),
        ({"MORI_SHMEM_HEAP_SIZE": "6G"}, {"transport": "mori", "emulate": True}, ""),
        ({"MORI_SHMEM_MODE": "ISOLATION"}, {"transport": "mori", "emulate": True}, ""),
        ({"AITER_USE_NT": "1"}, {}, "this case does not run aiter"),
        ({"AITER_USE_NT": "1"}, {"experts": "aiter"}, ""),
        ({COMBINE_DTYPE: "fp8"}, {}, "transport collective has no combine_quant"),
        ({RECV_BOUND: "1"}, {"limit": 64}, "limit is set by test"),
        ({RECV_BOUND: "1"}, {"limit": "off"}, ""),
        ({SDMA: "1"}, {}, "transport collective has no mori_kernel"),
        ({SDMA: "1"}, {"limit": "off", "recv_bound": True}, ""),
        ({"SOME_MORI_THING": "1"}, {}, "nothing that distbench runs reads it"),
        ({"MEMORIES": "1", "AITERATION": "1", "X_AITER_Y": "1"}, {}, ""),
        ({"MORI_RDMA_TC": ""}, {}, ""),
        ({"AITER_KSPLIT": "4"}, {"aiter_version": "0.1.8"}, "aiter 0.1.8 does not read it"),
        ({"AITER_KSPLIT": "4"}, {"aiter_version": "0.1.9"}, ""),
        ({"MORI_IO_POST_BATCH_SIZE": "1"}, {}, "for the transfer of the KV cache"),
    ],
)
def test_each_unused_variable_is_listed_with_its_reason(
    environ: dict[str, str], values: dict[str, Any], reason: str
) -> None:
    case = tiny_case(4, **values)
    lines = unused_variables(environ, case, {"limit": "test"})
    assert bool(lines) == bool(reason)
    assert not reason or f"{next(iter(environ))}={next(iter(environ.values()))} ({reason})" in lines[0]


def test_unused_variables_are_grouped_by_reason_and_secrets_are_hidden() -> None:
    environ = {"ATOM_HUB_TOKEN": "hf_x", "ATOM_A": "1", "ATOM_B": "2"}
    (line,) = unused_variables(environ, tiny_case(4), {})
    assert line == (
        "set and not used by this case: ATOM_A=1, ATOM_B=2, ATOM_HUB_TOKEN=(not shown) "
        "(nothing that distbench runs reads it)"
    )
    assert recorded_environment(environ) == {"ATOM_A": "1", "ATOM_B": "2"}


def test_every_variable_is_read_by_its_first_and_last_named_release() -> None:
    for name, span in VARIABLES.items():
        assert reads(name, span.first)
        assert reads(name, span.last or "")
        assert not span.last or not reads(name, "")
    assert rules_of("") == rules_of("0.5.23") == rules_of("0.6.0")
