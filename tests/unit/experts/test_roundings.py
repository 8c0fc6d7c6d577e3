"""Roundings of a family of kernels, as declared and as computed by the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.experts.reference import ReferenceExperts
from distbench.experts.roundings import Roundings, Scales, roundings_of, stored_intermediate
from distbench.experts.selection.choice import KernelChoice, KernelSelector
from distbench.experts.selection.heuristics import LayerKey
from distbench.utils.amd_arch import Fp8Format
from distbench.workload.quantize import fp8_dtype, quantize_fp8_blocks, quantize_weight_blocks, saturated
from tests.cases import tiny_case

CHOICE = KernelChoice(
    rows=8,
    bucket=8,
    source="heuristic",
    block_m=32,
    ksplit=0,
    run_1stage=False,
    stage1="",
    stage2="",
    stage2_mode="reduce",
    tile_k1=64,
    tile_k2=64,
)


@pytest.mark.parametrize(
    ("values", "one_stage", "mode", "expected"),
    [
        ({}, False, "reduce", Roundings()),
        ({}, True, "atomic", Roundings(bf16_intermediate=False, sums="bf16")),
        ({"dispatch_dtype": "fp8"}, False, "reduce", Roundings(weights="e4m3fn", intermediate="e4m3fn")),
        (
            {"dispatch_dtype": "fp8", "experts": "aiter", "emulate": True},
            True,
            "atomic",
            Roundings(
                weights="e4m3fnuz",
                intermediate="e4m3fnuz",
                bf16_intermediate=False,
                scales="maximum",
                sums="bf16",
            ),
        ),
    ],
)
def test_roundings_follow_the_chosen_kernel(
    values: dict[str, Any], one_stage: bool, mode: Any, expected: Roundings
) -> None:
    choice = KernelChoice(**(_fields(CHOICE) | {"run_1stage": one_stage, "stage2_mode": mode}))
    found = roundings_of(tiny_case(2, **values), choice)
    assert (found.weights, found.intermediate) == (expected.weights, expected.intermediate)
    assert found.bf16_intermediate == expected.bf16_intermediate
    assert found.sums == expected.sums
    if values:
        assert found.scales == expected.scales
        assert stored_intermediate(tiny_case(2, **values)) == "e4m3"


@pytest.mark.parametrize("inter", [96, 256])
@pytest.mark.parametrize("scales", ["power of two", "maximum"])
@pytest.mark.parametrize("fp8_format", ["e4m3fn", "e4m3fnuz"])
def test_reference_quantises_the_intermediate_of_fp8_rows(fp8_format: Fp8Format, scales: Scales, inter: int) -> None:
    """One expert, one route per row, computed here block by block with independent scales."""
    dtype = fp8_dtype(fp8_format)
    generator = torch.Generator().manual_seed(inter)
    w1 = (torch.randn(1, 2 * inter, 256, generator=generator) / 16).bfloat16()
    w2 = (torch.randn(1, 256, inter, generator=generator) / 16).bfloat16()
    hidden, a1_scale = quantize_fp8_blocks(torch.randn(6, 256, generator=generator).bfloat16(), dtype)
    layer = LayerKey(num_local_experts=1, topk=1, model_dim=256, inter_dim=inter, quant="fp8", cu_count=80)
    experts = ReferenceExperts(KernelSelector(layer=layer), 0, scales)
    ids, live = torch.zeros(6, 1, dtype=torch.int32), torch.tensor([6], dtype=torch.int32)
    given = ExpertInput(hidden, a1_scale, torch.ones(6, 1), ids, live)
    rows = experts(given, ExpertWeights(w1, w2, torch.ones(1, dtype=torch.int32)))
    wide = (hidden.double().view(6, 2, 128) * a1_scale.double().unsqueeze(2)).view(6, 256)
    gate, up = (wide @ _multiplied(half, dtype).t() for half in w1[0].chunk(2))
    middle = functional.silu(gate) * up
    if not experts.selection(6).run_1stage:
        middle = middle.bfloat16().double()
    for start in range(0, inter, 128):
        block = middle[:, start : start + 128]
        amax = block.abs().amax(1, keepdim=True).float()
        scale = amax / torch.finfo(dtype).max
        if scales == "power of two":
            scale = torch.exp2(torch.ceil(torch.log2(scale)))
        block.copy_(saturated(block.float() / scale, dtype).double() * scale)
    expected = middle @ _multiplied(w2[0], dtype).t()
    assert float((rows.double() - expected).abs().max() / expected.abs().max()) < 2.0**-7


def _multiplied(weights: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    narrow, scale = quantize_weight_blocks(weights.unsqueeze(0), dtype)
    tall = scale[0].repeat_interleave(128, 0)[: weights.shape[0]]
    return narrow[0].double() * tall.repeat_interleave(128, 1)[:, : weights.shape[1]]


def _fields(choice: KernelChoice) -> dict[str, Any]:
    return {name: getattr(choice, name) for name in choice.__struct_fields__}
