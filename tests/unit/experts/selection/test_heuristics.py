from __future__ import annotations

from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench.experts.selection.heuristics import LayerKey, block_rows, default_stage, runs_one_stage, split_parts
from distbench.experts.selection.releases import BUCKET_RULES, CURRENT

BUCKETS = [1 << power for power in range(16)]

# Worked tables of the reference: (compute units, (E, topk, inter), whether topk counts whole, [(block_m, up to)]).
WORKED = [
    (256, (32, 8, 2048), False, [(32, 32), (64, 64), (128, 32768)]),
    (256, (32, 8, 2048), True, [(32, 64), (64, 128), (128, 32768)]),
    (256, (32, 7, 2048), False, [(32, 64), (64, 128), (128, 32768)]),
    (304, (32, 8, 2048), False, [(32, 16), (64, 32), (128, 64), (64, 128), (128, 32768)]),
    (304, (33, 9, 2048), False, [(32, 8), (64, 16), (128, 32), (32, 64), (64, 128), (128, 32768)]),
    (256, (256, 8, 256), False, [(32, 256), (64, 512), (128, 32768)]),
    (256, (16, 2, 1024), False, [(32, 128), (64, 256), (128, 512), (64, 1024), (128, 32768)]),
    (80, (32, 8, 2048), False, [(32, 8), (64, 16), (128, 32768)]),
]


def layer(experts: int, topk: int, inter: int, **changes: Any) -> LayerKey:
    values = {"model_dim": 7168, "is_ep": False} | changes
    return LayerKey(num_local_experts=experts, topk=topk, inter_dim=inter, **values)


@pytest.mark.parametrize(("cu_count", "shape", "is_ep", "expected"), WORKED)
def test_block_rows_equal_the_worked_tables(
    cu_count: int, shape: tuple[int, int, int], is_ep: bool, expected: list[tuple[int, int]]
) -> None:
    key = layer(*shape, cu_count=cu_count, is_ep=is_ep)
    wanted = [next(block for block, last in expected if bucket <= last) for bucket in BUCKETS]
    assert [block_rows(bucket, key, CURRENT) for bucket in BUCKETS] == wanted


@pytest.mark.parametrize(
    ("shape", "bucket", "rows"),
    [
        pytest.param((64, 2, 768), 64, 128, id="columns-times-slots-is-divided-not-slots"),
        pytest.param((32, 9, 2048), 8, 32, id="topk-slots-less-than-full-blocks"),
        pytest.param((8, 9, 1536), 32, 128, id="fewest-idle-units-among-equal-rounds"),
        pytest.param((1, 1, 128), 4, 32, id="smallest-block-among-equals"),
        pytest.param((64, 2, 705), 64, 128, id="part-columns-count-whole"),
    ],
)
def test_block_rows_follow_the_deciding_term(shape: tuple[int, int, int], bucket: int, rows: int) -> None:
    assert block_rows(bucket, layer(*shape, cu_count=80), CURRENT) == rows


def test_topk_is_not_reduced_under_expert_parallelism_before_0_1_16() -> None:
    key = layer(32, 8, 2048, cu_count=256, is_ep=True)
    assert block_rows(64, key, BUCKET_RULES["0.1.14"]) == 64
    assert block_rows(64, key, CURRENT) == 32
    assert [key.lookup_topk(BUCKET_RULES[since]) for since in ("0.1.5", "0.1.14", "0.1.16")] == [8, 8, 7]
    assert layer(32, 8, 2048).lookup_topk(CURRENT) == 8


def test_split_parts_equal_the_worked_table() -> None:
    key = layer(256, 8, 256, cu_count=256, quant="fp8")
    assert [split_parts(bucket, key, CURRENT) for bucket in (1, 2, 4, 8, 16)] == [14, 7, 4, 2, 0]


@pytest.mark.parametrize(
    ("changes", "bucket", "parts"),
    [
        ({"quant": "bf16"}, 1, 0),
        ({"cu_count": 16}, 1, 0),
        ({"cu_count": 17}, 1, 2),
        ({"model_dim": 7168 + 128}, 1, 0),
        ({"model_dim": 768}, 1, 3),
        ({"num_local_experts": 8}, 1, 14),
        ({"num_local_experts": 7}, 1, 0),
        ({"is_ep": True}, 1, 14),
        ({"is_ep": True}, 2, 7),
        ({"is_ep": True, "cu_count": 112}, 8, 0),
        ({"cu_count": 113}, 8, 0),
        ({"topk": 1, "inter_dim": 128, "cu_count": 28}, 1, 28),
    ],
)
def test_split_requires_idle_units_few_routes_and_a_divisible_model_dim(
    changes: dict[str, Any], bucket: int, parts: int
) -> None:
    values: dict[str, Any] = {"num_local_experts": 256, "topk": 8, "inter_dim": 256, "model_dim": 7168, "cu_count": 256}
    values |= {"quant": "fp8", "is_ep": False}
    assert split_parts(bucket, LayerKey(**(values | changes)), CURRENT) == parts


def test_split_parts_follow_the_generation_of_rules() -> None:
    key = layer(256, 8, 256, cu_count=256, quant="fp8")
    parts = {since: split_parts(1, key, rules) for since, rules in BUCKET_RULES.items()}
    assert [parts.pop(since) for since in ("0.1.5", "0.1.8", "0.1.9")] == [0, 0, 7]
    assert set(parts.values()) == {14}


def test_topk_counted_as_zero_gives_no_split() -> None:
    assert split_parts(1, layer(8, 1, 256, is_ep=True, quant="fp8"), CURRENT) == 0


def test_one_stage_choice_follows_the_generation_of_rules() -> None:
    wide, odd, narrow = (layer(32, 8, inter, quant="fp8") for inter in (256, 384, 192))
    found = {
        since: [runs_one_stage(bucket, key, rules) for bucket, key in [(32, wide), (64, wide), (64, odd), (64, narrow)]]
        for since, rules in BUCKET_RULES.items()
    }
    always, large, large_any = [True, True, False, False], [False, True, False, False], [False, True, True, False]
    assert found == {
        "0.1.5": always,
        "0.1.8": always,
        "0.1.9": large,
        "0.1.9.post1": large,
        "0.1.10": [False] * 4,
        "0.1.10.post1": large,
        "0.1.12": large_any,
        "0.1.13": large_any,
        "0.1.14": large_any,
        "0.1.16": large_any,
    }


def test_smallest_bucket_is_one_stage_before_0_1_9() -> None:
    assert runs_one_stage(1, layer(32, 8, 256, quant="fp8"), BUCKET_RULES["0.1.5"])


@given(bucket=st.sampled_from(BUCKETS), inter=st.integers(1, 64).map(lambda n: n * 64))
def test_bf16_is_never_one_stage_and_never_split(bucket: int, inter: int) -> None:
    for rules in BUCKET_RULES.values():
        key = layer(32, 8, inter)
        assert not runs_one_stage(bucket, key, rules)
        assert split_parts(bucket, key, rules) == 0


def test_fp8_two_stage_blocks_have_16_rows_up_to_bucket_32_since_0_1_9() -> None:
    key = layer(32, 8, 192, quant="fp8")
    blocks = {
        since: [block_rows(bucket, key, rules) for bucket in (1, 32, 64)] for since, rules in BUCKET_RULES.items()
    }
    assert [blocks.pop(since) for since in ("0.1.5", "0.1.8")] == [[64, 64, 64]] * 2
    assert all(found == [16, 16, 64] for found in blocks.values())


# (gfx, inter_dim) → per block_m 32, 64, 128 the (columns, K, pipeline) of stage 1, then of stage 2.
BF16_TILES = {
    ("gfx942", 2048): ["n64_k64_v1", "n128_k64_v3", "n128_k64_v3", "n64_k64_v1", "n128_k64_v3", "n128_k64_v3"],
    ("gfx942", 192): ["n64_k64_v1", "n64_k64_v1", "n64_k64_v1", "n64_k64_v1", "n64_k64_v1", "n64_k64_v3"],
    ("gfx950", 193): ["n64_k64_v1", "n64_k64_v1", "n128_k64_v3", "n128_k128_v1", "n128_k128_v1", "n128_k64_v3"],
    ("gfx950", 192): ["n64_k64_v1", "n64_k64_v1", "n64_k64_v1", "n64_k64_v1", "n128_k64_v1", "n64_k64_v3"],
}


@pytest.mark.parametrize(("gfx", "inter"), BF16_TILES)
def test_bf16_tile_names_follow_architecture_and_width(gfx: str, inter: int) -> None:
    key = layer(32, 8, inter, gfx=gfx)
    stages: list[tuple[Literal[1, 2], int]] = [(1, 32), (1, 64), (1, 128), (2, 32), (2, 64), (2, 128)]
    names = [default_stage(stage, block, key, CURRENT).name for stage, block in stages]
    assert names == [
        f"ck_2stages_gemm{stage}_bm{block}_{tile}"
        for (stage, block), tile in zip(stages, BF16_TILES[gfx, inter], strict=True)
    ]


def test_bf16_tiles_before_0_1_8_have_no_narrow_variant_and_a_longer_k() -> None:
    for inter in (128, 2048):
        key = layer(32, 8, inter, gfx="gfx942")
        assert default_stage(1, 64, key, BUCKET_RULES["0.1.5"]) == ("ck_2stages_gemm1_bm64_n128_k128_v3", 128)
        assert default_stage(1, 32, key, BUCKET_RULES["0.1.5"]).tile_k == 64
        assert default_stage(2, 64, key, BUCKET_RULES["0.1.5"]) == ("ck_2stages_gemm2_bm64_n128_k64_v3", 64)
        assert default_stage(1, 64, key, BUCKET_RULES["0.1.8"]).tile_k == 64
    wide = layer(32, 8, 128, gfx="gfx950")
    assert default_stage(1, 64, wide, BUCKET_RULES["0.1.5"]) == ("ck_2stages_gemm1_bm64_n64_k64_v1", 64)


def test_fp8_tile_names_follow_block_width_and_release() -> None:
    fits, odd = (layer(32, 8, inter, quant="fp8") for inter in (256, 384))
    assert default_stage(1, 16, odd, CURRENT) == ("ck_2stages_gemm1_bm16_n128_k256_v1", 256)
    assert default_stage(2, 16, fits, CURRENT) == ("ck_2stages_gemm2_bm16_n128_k256_v1", 256)
    assert default_stage(2, 16, odd, CURRENT) == ("ck_2stages_gemm2_bm16_n128_k128_v1", 128)
    assert default_stage(2, 16, odd, BUCKET_RULES["0.1.9"]).tile_k == 256
    assert default_stage(1, 64, odd, CURRENT) == ("ck_2stages_gemm1_bm64_n128_k128_v3", 128)
    assert default_stage(2, 64, layer(32, 8, 192, quant="fp8"), CURRENT).name == "ck_2stages_gemm2_bm64_n128_k128_v3"


def test_fp8_stage_1_is_assembly_before_0_1_9() -> None:
    key = layer(32, 8, 192, quant="fp8")
    assert default_stage(1, 64, key, BUCKET_RULES["0.1.8"]) == ("asm_stage1_bm64", 128)
    assert default_stage(2, 64, key, BUCKET_RULES["0.1.8"]).name.startswith("ck_2stages_gemm2_bm64")
    assert default_stage(1, 64, layer(32, 8, 192), BUCKET_RULES["0.1.8"]).name.startswith("ck_2stages")


@pytest.mark.parametrize(
    ("cu_count", "gfx", "arch"),
    [
        (304, None, "gfx942"),
        (80, None, "gfx942"),
        (256, None, "gfx950"),
        (64, None, "gfx942"),
        (64, "gfx950", "gfx950"),
    ],
)
def test_architecture_is_taken_from_gfx_or_inferred_from_the_compute_units(
    cu_count: int, gfx: str | None, arch: str
) -> None:
    assert layer(32, 8, 2048, cu_count=cu_count, gfx=gfx).arch == arch
