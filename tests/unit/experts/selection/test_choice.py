from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench.experts.selection.choice import (
    BUCKET_RULES,
    CURRENT,
    BucketRules,
    KernelChoice,
    KernelSelector,
    LayerKey,
    Overrides,
    TunedKey,
    TunedRow,
    load_tuned_rows,
)

DATA = Path(__file__).parents[3] / "data"
TINY = LayerKey(num_local_experts=4, topk=4, model_dim=256, inter_dim=128)
DEEPSEEK = LayerKey(num_local_experts=32, topk=8, model_dim=7168, inter_dim=2048)
BUCKETS = [1 << power for power in range(16)] + [131_072]


def row(bucket: int, **changes: Any) -> TunedRow:
    values: dict[str, Any] = {
        "block_m": 64,
        "ksplit": 0,
        "run_1stage": False,
        "kernel_name1": "moe_ck2stages_gemm1_256x64x128x256_",
    }
    values |= {"kernel_name2": "flydsl_moe2_t32x128x512_reduce"}
    return TunedRow(bucket=bucket, **(values | changes))


def choice(**changes: Any) -> KernelChoice:
    return msgspec.structs.replace(KernelSelector(layer=DEEPSEEK).choose(1), **changes)


@given(rows=st.integers(0, 300_000))
def test_heuristic_choice_depends_on_the_bucket_only(rows: int) -> None:
    selector = KernelSelector(layer=DEEPSEEK)
    found = selector.choose(rows)
    assert found == msgspec.structs.replace(selector.choose(found.bucket), rows=rows)
    assert found.source == "heuristic"
    assert found.rows == rows


def test_bf16_choice_without_a_table_is_two_stage_by_heuristics() -> None:
    small, large = KernelSelector(layer=DEEPSEEK).choose(3), KernelSelector(layer=DEEPSEEK).choose(4096)
    assert small == KernelChoice(
        rows=3,
        bucket=4,
        source="heuristic",
        block_m=32,
        ksplit=0,
        run_1stage=False,
        stage1="ck_2stages_gemm1_bm32_n64_k64_v1",
        stage2="ck_2stages_gemm2_bm32_n64_k64_v1",
        stage2_mode="atomic",
        tile_k1=64,
        tile_k2=64,
    )
    assert (large.bucket, large.block_m, large.stage1) == (4096, 128, "ck_2stages_gemm1_bm128_n128_k64_v3")


def test_stage_2_tile_k_differs_for_small_buckets_on_gfx950() -> None:
    selector = KernelSelector(layer=msgspec.structs.replace(DEEPSEEK, cu_count=256))
    assert [selector.choose(rows).tile_k2 for rows in (32, 128, 256)] == [128, 128, 64]
    assert {selector.choose(rows).tile_k1 for rows in (32, 128, 256)} == {64}


def test_fp8_without_a_table_is_split_then_two_stage_then_one_stage() -> None:
    selector = KernelSelector(layer=msgspec.structs.replace(DEEPSEEK, quant="fp8"))
    one, many, most = (selector.choose(rows) for rows in (1, 32, 33))
    assert (one.ksplit, one.block_m, one.run_1stage, one.tile_k1) == (2, 16, False, 256)
    assert (many.ksplit, many.block_m, many.run_1stage) == (0, 16, False)
    assert (most.ksplit, most.block_m, most.run_1stage, most.stage1, most.stage2) == (
        0,
        32,
        True,
        "asm_1stage_bm32",
        "",
    )
    assert (most.tile_k1, most.tile_k2, most.stage2_mode, most.source) == (128, 128, "atomic", "heuristic")


@pytest.mark.parametrize(
    ("release", "overrides", "source", "ksplit"),
    [
        ("0.1.8", {"ksplit": 6, "bypass_tuned": True}, "tuned", 3),
        ("0.1.9", {"bypass_tuned": True}, "heuristic", 2),
        ("0.1.16", {"bypass_tuned": True}, "heuristic", 2),
        ("0.1.16", {"bypass_tuned": True, "ksplit": 6}, "heuristic", 6),
        ("0.1.16", {"ksplit": 6}, "tuned", 3),
        ("0.1.12", {"ksplit": -1}, "tuned", 3),
        ("0.1.13", {"ksplit": -1}, "tuned", 0),
    ],
)
def test_aiter_override_changes_the_choice_if_the_release_reads_it(
    release: str, overrides: dict[str, Any], source: str, ksplit: int
) -> None:
    selector = KernelSelector(
        layer=msgspec.structs.replace(DEEPSEEK, quant="fp8"),
        tuned=(row(1, ksplit=3), row(16, ksplit=3)),
        rules=BUCKET_RULES[release],
        overrides=Overrides(**overrides),
    )
    found = selector.choose(1)
    assert (found.source, found.ksplit) == (source, ksplit)


def test_bf16_choice_ignores_the_ksplit_override() -> None:
    selector = KernelSelector(layer=DEEPSEEK, overrides=Overrides(ksplit=4))
    assert selector.choose(1).ksplit == 0


def test_tuned_row_determines_every_field_but_the_rows() -> None:
    found = KernelSelector(layer=DEEPSEEK, tuned=(row(64, ksplit=3),)).choose(33)
    assert found == KernelChoice(
        rows=33,
        bucket=64,
        source="tuned",
        block_m=64,
        ksplit=3,
        run_1stage=False,
        stage1="moe_ck2stages_gemm1_256x64x128x256_",
        stage2="flydsl_moe2_t32x128x512_reduce",
        stage2_mode="reduce",
        tile_k1=256,
        tile_k2=512,
    )


def test_bucket_without_a_tuned_row_uses_heuristics_not_a_neighbour() -> None:
    selector = KernelSelector(layer=DEEPSEEK, tuned=(row(64), row(256)))
    assert [selector.choose(rows).source for rows in (64, 65, 129)] == ["tuned", "heuristic", "tuned"]


def test_first_of_two_tuned_rows_of_a_bucket_applies() -> None:
    assert KernelSelector(layer=DEEPSEEK, tuned=(row(64), row(64, block_m=16))).choose(64).block_m == 64


def test_top_bucket_falls_back_to_the_tier_below_it() -> None:
    lower = row(32_768, block_m=16)
    selector = KernelSelector(layer=DEEPSEEK, tuned=(lower, row(16_384)))
    assert (selector.choose(200_000).block_m, selector.choose(200_000).bucket) == (16, 131_072)
    assert KernelSelector(layer=DEEPSEEK, tuned=(lower, row(131_072))).choose(200_000).block_m == 64
    assert KernelSelector(layer=DEEPSEEK, tuned=(row(16_384),)).choose(200_000).source == "heuristic"
    assert KernelSelector(layer=DEEPSEEK, tuned=(row(16_384),)).choose(32_768).source == "heuristic"


def test_top_bucket_does_not_fall_back_before_0_1_14() -> None:
    rules = BUCKET_RULES["0.1.8"]
    assert KernelSelector(layer=DEEPSEEK, tuned=(row(2048),), rules=rules).choose(20_000).source == "heuristic"
    assert KernelSelector(layer=DEEPSEEK, tuned=(row(1024),), rules=BUCKET_RULES["0.1.5"]).choose(20_000).block_m == 64


def test_one_stage_row_is_atomic_with_any_kernel_name() -> None:
    found = KernelSelector(layer=DEEPSEEK, tuned=(row(1, run_1stage=True, kernel_name2=""),)).choose(1)
    assert (found.run_1stage, found.stage2, found.stage2_mode, found.tile_k2) == (True, "", "atomic", 128)


@pytest.mark.parametrize(("column", "parts"), [(0, 4), (1, 4), (2, 2), (8, 8)])
def test_split_given_only_in_the_kernel_name_counts(column: int, parts: int) -> None:
    tuned = row(1, kernel_name1="flydsl_moe1_abf16_wbf16_bf16_t32x64x64_kb4", ksplit=column)
    assert KernelSelector(layer=DEEPSEEK, tuned=(tuned,)).choose(1).ksplit == parts


@pytest.mark.parametrize(
    ("changes", "label"),
    [
        ({}, "H bm32 2-stage atomic k64"),
        ({"ksplit": 1}, "H bm32 2-stage atomic k64"),
        ({"ksplit": 2}, "H bm32 2-stage atomic k64 ks2"),
        ({"ksplit": 4, "source": "tuned"}, "T bm32 2-stage atomic k64 ks4"),
        ({"run_1stage": True, "block_m": 16}, "H bm16 1-stage atomic k64"),
        ({"tile_k2": 128, "stage2_mode": "reduce"}, "H bm32 2-stage reduce k64/128"),
    ],
)
def test_label_of_a_choice_names_its_differing_parts(changes: dict[str, Any], label: str) -> None:
    assert choice(**changes).label == label


@pytest.mark.parametrize(
    "changes",
    [{"rows": 7}, {"bucket": 8}, {"rows": 7, "bucket": 8}, {"ksplit": 1}, {"source": "tuned"}],
    ids=str,
)
def test_same_kernel_ignores_how_the_choice_was_made(changes: dict[str, Any]) -> None:
    assert choice(**changes).same_kernel(choice())
    assert choice().same_kernel(choice(**changes))


@pytest.mark.parametrize(
    "changes",
    [
        {"block_m": 64},
        {"ksplit": 2},
        {"run_1stage": True},
        {"stage1": "other"},
        {"stage2": "other"},
        {"stage2_mode": "reduce"},
        {"tile_k1": 128},
        {"tile_k2": 128},
    ],
    ids=str,
)
def test_same_kernel_is_false_if_any_part_differs(changes: dict[str, Any]) -> None:
    assert not choice(**changes).same_kernel(choice())


def test_kernel_choice_survives_a_json_round_trip() -> None:
    assert msgspec.json.decode(msgspec.json.encode(choice()), type=KernelChoice) == choice()


@pytest.mark.parametrize("cu_count", [304, 256])
def test_splitk_example_table_splits_small_buckets_only(cu_count: int) -> None:
    layer = msgspec.structs.replace(TINY, cu_count=cu_count)
    selector = KernelSelector(layer=layer, tuned=load_tuned_rows(DATA / "splitk.csv", TunedKey.for_layer(layer)))
    choices = [selector.choose(bucket) for bucket in BUCKETS]
    assert [found.ksplit for found in choices] == [4] * 8 + [0] * 9
    assert {(found.source, found.stage2_mode, found.block_m) for found in choices} == {("tuned", "reduce", 32)}
    # A split changes bits only if each part has more than one block of K.
    assert {TINY.model_dim // found.tile_k1 for found in choices} == {8}


@pytest.mark.parametrize("cu_count", [304, 256])
def test_atomic_example_table_selects_one_kernel_for_all_buckets(cu_count: int) -> None:
    layer = msgspec.structs.replace(TINY, cu_count=cu_count)
    selector = KernelSelector(layer=layer, tuned=load_tuned_rows(DATA / "atomic.csv", TunedKey.for_layer(layer)))
    choices = [selector.choose(bucket) for bucket in BUCKETS]
    assert {found.label for found in choices} == {"T bm32 2-stage atomic k32"}
    assert all(found.same_kernel(choices[0]) for found in choices)


def test_example_tables_do_not_match_releases_that_count_the_whole_topk() -> None:
    key = TunedKey.for_layer(TINY, BUCKET_RULES["0.1.14"])
    assert key.topk == 4
    assert load_tuned_rows(DATA / "splitk.csv", key) == ()


@given(
    rows=st.integers(0, 1 << 24),
    layer=st.builds(
        LayerKey,
        num_local_experts=st.integers(1, 512),
        topk=st.integers(1, 16),
        model_dim=st.integers(1, 1 << 14),
        inter_dim=st.integers(1, 1 << 14),
        quant=st.sampled_from(["bf16", "fp8"]),
        is_ep=st.booleans(),
        cu_count=st.integers(1, 512),
        gfx=st.sampled_from([None, "gfx942", "gfx950", "gfx1250"]),
    ),
    rules=st.sampled_from(list(BUCKET_RULES.values())),
)
def test_any_layer_has_a_kernel_for_any_row_count(rows: int, layer: LayerKey, rules: BucketRules) -> None:
    found = KernelSelector(layer=layer, rules=rules).choose(rows)
    assert found.block_m in (16, 32, 64, 128)
    assert found.tile_k1 > 0
    assert found.tile_k2 > 0
    assert found.ksplit == 0 or layer.model_dim % (found.ksplit * 256) == 0


def test_selector_uses_the_newest_rules_by_default() -> None:
    assert KernelSelector(layer=DEEPSEEK).rules is CURRENT


def test_selection_module_imports_neither_torch_nor_csv() -> None:
    code = "import sys, distbench.experts.selection.choice; print(sorted({'torch', 'csv', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
