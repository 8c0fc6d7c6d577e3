from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distbench.experts.selection.kernel_names import DEFAULT_TILE_K, ck_tile, named_split, stage2_mode, tile_k

CK = "1x4_TypeCast_v3_Nswizzle0_Quant0_MulRoutedWeight"

# Names from the tables of aiter 0.1.7 to 0.1.20: (name, K, mode as stage 2).
NAMES = [
    (f"moe_ck2stages_gemm1_256x64x128x64_{CK}0_silu_B16_B16_B16", 64, "atomic"),
    (f"moe_ck2stages_gemm2_256x32x64x128_{CK}1_B16_B16_B16", 128, "atomic"),
    ("moe_ck2stages_gemm2_64x16x64x32_1x1_MulABScaleExpertWeight_v1_Nswizzle0_Quant2_F8_F8_B16", 32, "atomic"),
    ("_ZN5aiter48fmoe_stage1_bf16_pertokenFp8_g1u1_32x128_3tg_pf3E", 128, "atomic"),
    ("_ZN5aiter45fmoe_bf16_pertokenFp8_g1u1_vs_silu_1tg_32x256E", 128, "atomic"),
    ("flydsl_moe1_afp8_wfp4_bf16_t32x64x256_w4_gui_kw4_fp8", 256, "atomic"),
    ("flydsl_moe2_afp4_wfp4_bf16_t64x128x512_atomic_persist_async_w4_cumul3", 512, "atomic"),
    ("flydsl_moe2_afp4_wfp4_bf16_t32x128x64_reduce", 64, "reduce"),
    ("flydsl_moe2_afp4_wfp4_bf16_t64x256x256_reduce_persist_sbm128", 256, "reduce"),
    ("flydsl_moe2_layout_afp4_wfp4_bf16_t64x256x32_reduce_sbm64_sp801", 32, "reduce"),
    ("flydsl_moe2_layout_afp4_wfp4_bf16_t32x128x256_atomic_nt_sbm32", 256, "atomic"),
    ("flydsl_mxmoe_g2_a4w4_16x256x512_atomic_nt", 512, "atomic"),
    ("flydsl_mxmoe_g2_a4w4_128x256x256_f4out", 256, "reduce"),
    ("opus_moe2_afp8_wfp4_fp8_t64x256x256_sbm64_rbn3584", 256, "reduce"),
    ("opus_moe2_afp8_wfp4_atomic_t32x128x256_sbm32_occ1_cache_b2_ws2", 256, "atomic"),
    ("opus_moe1_afp8_wfp4_bf16_t32x384_gs_qgb6_stream_k8_fp8", 128, "atomic"),
    ("swiglu_mxfp4_bf16_cktile", 128, "atomic"),
    ("flydsl_moe2_t16x16x1_atomic", 1, "atomic"),
    ("flydsl_moe2_t16x16x0_atomic", 1, "atomic"),
    ("cktile_a8w4_bm64", 128, "atomic"),
    ("", 128, "atomic"),
    ("some_kernel_of_tomorrow", 128, "atomic"),
]


@pytest.mark.parametrize(("name", "k", "mode"), NAMES)
def test_tile_k_and_mode_are_parsed_from_names_of_every_family(name: str, k: int, mode: str) -> None:
    assert (tile_k(name), stage2_mode(name)) == (k, mode)


def test_default_tile_k_is_one_scale_block() -> None:
    assert DEFAULT_TILE_K == 128


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("flydsl_moe1_afp4_wfp4_bf16_t32x64x256_w3_kb4_xcd4_fp4", 4),
        ("flydsl_moe1_abf16_wbf16_bf16_t32x64x32_kb16", 16),
        ("flydsl_mxmoe_g1_a4w4_16x256x256_sk2_nt", 2),
        ("flydsl_moe1_afp4_wfp4_bf16_t32x32x256_w3_kw2_fp4", 0),
        ("opus_moe1_afp8_wfp4_bf16_t32x384_gs_stream_k8_fp8", 0),
        ("flydsl_moe1_kb4x", 0),
        ("", 0),
    ],
)
def test_split_parts_are_parsed_from_the_kernel_name(name: str, parts: int) -> None:
    assert named_split(name) == parts


@given(st.text(alphabet="_x0123456789abt") | st.text())
def test_any_text_parses_to_a_tile_k_and_a_mode(name: str) -> None:
    assert tile_k(name) >= 1
    assert stage2_mode(name) in ("reduce", "atomic")
    assert named_split(name) >= 0


@pytest.mark.parametrize(
    ("name", "tile"),
    [
        ("moe_ck2stages_gemm1_256x64x128x64_1x4_MulABScale_v1", (128, 64)),
        ("ck_2stages_gemm2_bm32_n128_k256_v1", (128, 256)),
        ("flydsl_moe2_afp8_wfp8_bf16_t32x128x256_reduce", None),
        ("asm_stage1_bm64", None),
    ],
)
def test_ck_tile_is_parsed_from_the_kernel_name(name: str, tile: tuple[int, int] | None) -> None:
    assert ck_tile(name) == tile
