"""The proof of exactness: any correct kernel gives the oracle's bits, and any combine those of its tokens."""

from __future__ import annotations

import os
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from distbench.case.presets import PRESETS
from distbench.errors import DistbenchError
from distbench.transport.mori.emulated import codec, quirks
from distbench.workload import oracle as module
from distbench.workload.exact_plan import plan_exact
from distbench.workload.inputs import Workload, make_workload
from distbench.workload.oracle import expert_rows
from distbench.workload.quantize import dequantize, fp8_dtype
from tests.unit.workload.kernels import VARIANTS, Kernel, layer_of, run
from tests.unit.workload.shapes import (
    SHAPES,
    plan_of_workload,
    random_workload,
    same_bits,
    some_routes_nowhere,
    workload_of,
)

SOAK = os.environ.get("DISTBENCH_SOAK") == "1"


def check_all_variants(workload: Workload, seed: int, monkeypatch: pytest.MonkeyPatch) -> int:
    """Compare the rows and combined tokens of every variant with the oracle; return the number of variants."""
    plan, group = plan_of_workload(workload), workload.group
    batch = workload.tokens(seed % group.ep_size)
    if seed % 3 == 0:
        batch = some_routes_nowhere(batch, seed)
    expected = workload.expected(batch)
    shares = [workload.expected_rows(rank, batch) for rank in range(group.ep_size)]
    layers = [layer_of(workload, range(rank, rank + 1), seed=seed) for rank in range(group.ep_size)]
    monkeypatch.setattr(quirks, "fp8_format", lambda: plan.fp8_format)
    travel = codec.make_codec(plan.combine, torch.bfloat16, plan.hidden_size, external=True)
    assert expected is not None
    for name, kernel in VARIANTS.items():
        total = torch.zeros(expected.shape)
        for layer, share in zip(layers, shares, strict=True):
            rows = run(kernel, layer, batch)
            assert share is not None
            assert same_bits(rows, share), (name, plan)
            total = travel.add(total, travel.pack(rows))
        assert same_bits(total.bfloat16(), expected), (name, plan)
    return len(VARIANTS)


@pytest.mark.parametrize("name", SHAPES)
def test_every_correct_kernel_variant_gives_the_bits_of_the_oracle(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_all_variants(workload_of(name, 5, tokens=4), 1, monkeypatch) >= 22


@pytest.mark.parametrize("combine", ["none", "fp8_direct_cast", "fp8_blockwise"])
@pytest.mark.parametrize("name", ["tiny", "tiny fp8", "tiny fnuz", "qwen3-30b-a3b/8"])
def test_oracle_holds_for_every_combine_and_for_an_e4m3_intermediate(
    name: str, combine: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    intermediate = "e4m3" if "f" in name[5:] and name.startswith("tiny") else "bf16"
    workload = workload_of(name, 6, tokens=8, combine_quant=combine, intermediate=intermediate)
    check_all_variants(workload, 2, monkeypatch)


@pytest.mark.parametrize("seed", range(3000 if SOAK else 12))
def test_every_correct_kernel_variant_gives_the_bits_of_the_oracle_for_random_shapes(
    seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_all_variants(random_workload(seed), seed, monkeypatch)


def test_gaussian_inputs_distinguish_the_kernel_variants() -> None:
    workload = workload_of("tiny", numerics="gaussian", tokens=2)
    weights = [
        torch.cat(part).float() for part in zip(*(workload.local_weights(rank) for rank in range(2)), strict=True)
    ]
    layer = layer_of(workload_of("tiny"), range(2))._replace(w1=weights[0], w2=weights[1])
    plain = run(VARIANTS["plain"], layer, workload.tokens(0))
    for name in ("split-k", "gates in bf16", "one stage"):
        assert not same_bits(plain, run(VARIANTS[name], layer, workload.tokens(0))), name


@pytest.mark.parametrize("dtype", ["bf16", "e4m3fn", "e4m3fnuz"])
@pytest.mark.parametrize("variant", ["plain", "everything"])
def test_oracle_holds_for_full_size_qwen_experts(dtype: Literal["bf16", "e4m3fn", "e4m3fnuz"], variant: str) -> None:
    shape = PRESETS["qwen3-30b-a3b"]
    workload = make_workload(
        numerics="exact",
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=128,
        topk=8,
        ep_size=128,
        seed=9,
        routing="hot-rank:77",
        tokens_per_rank=(24,) * 128,
        dispatch_dtype="bf16" if dtype == "bf16" else "fp8",
        fp8_format="e4m3fn" if dtype == "bf16" else dtype,
        intermediate="bf16" if dtype == "bf16" else "e4m3",
        device="cpu",
    )
    batch = workload.tokens(3)
    expected = workload.expected_rows(77, batch)
    assert expected is not None
    assert bool(expected.any(1).all())
    assert same_bits(run(VARIANTS[variant], layer_of(workload, range(77, 78)), batch), expected)


def in_float64(workload: Workload, batch: Any) -> Tensor:
    """Layer in float64, with the intermediate rounded as stored and the sum rounded once."""
    plan = plan_of_workload(workload)
    wide = dequantize(batch.hidden, batch.scales).double()
    total = torch.zeros_like(wide)
    for expert in range(workload.group.num_experts):
        w1, w2 = (part[0].double() for part in workload.numerics.dense_weights(torch.tensor([expert])))
        gate, up = (wide @ w1.t()).chunk(2, dim=1)
        stored = (functional.silu(gate) * up).bfloat16()
        if plan.intermediate == "e4m3":
            within = stored.abs() <= 64  # guard values are larger, and exact
            stored = torch.where(within, stored.float().to(fp8_dtype(plan.fp8_format)).bfloat16(), stored)
        share = ((batch.ids == expert) * batch.weights).sum(1, keepdim=True)
        total += stored.double() @ w2.t() * share
    return (total + 0.0).bfloat16()


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("routing", ["uniform", "zipf:1.5"])
def test_oracle_of_a_large_batch_equals_a_dense_product(
    name: str, routing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    workload = workload_of(name, 3, routing, tokens=60)
    batch = workload.tokens(0)
    expected = workload.expected(batch)
    assert expected is not None
    assert same_bits(expected, in_float64(workload, batch))
    for limit in ("_CHUNK_BYTES", "_BLOCK_BYTES"):
        monkeypatch.setattr(module, limit, 40_000)
        again = workload.expected(batch)
        assert again is not None
        assert same_bits(again, expected)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 1 << 40))
def test_oracle_of_any_shape_equals_a_dense_product(seed: int) -> None:
    workload = random_workload(seed)
    batch = workload.tokens(0)
    rows = workload.numerics.expert_rows(batch, range(workload.group.num_experts))
    assert rows is not None
    assert same_bits(rows, in_float64(workload, batch))


def test_oracle_without_cached_patterns_gives_the_same_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workload_of("tiny", 4, tokens=40)
    batch = workload.tokens(0)
    expected = workload.expected(batch)
    monkeypatch.setattr("distbench.workload.exact_plan.KEPT_BYTES", 0)
    monkeypatch.setattr("distbench.workload.draws.KEPT_BYTES", 0)
    again, weights = workload.expected(batch), workload.local_weights(1)
    monkeypatch.undo()
    assert expected is not None
    assert again is not None
    assert same_bits(again, expected)
    assert all(same_bits(one, other) for one, other in zip(workload.local_weights(1), weights, strict=True))


def test_expert_selected_twice_by_a_token_is_added_twice() -> None:
    workload = workload_of("tiny", 8)
    ids = workload.tokens(0).ids.clone()
    ids[:, 1] = ids[:, 0]
    keys = torch.arange(6)
    batch = workload.tokens(0)._replace(ids=ids, hidden=workload.numerics.hidden_states(keys, ids))
    expected = workload.expected(batch)
    assert expected is not None
    assert same_bits(run(Kernel(), layer_of(workload, range(2)), batch), expected)


def test_zeros_of_the_oracle_are_positive_and_rows_without_experts_are_zero() -> None:
    workload = workload_of("tiny")
    batch = workload.tokens(0)
    expected = workload.expected(batch)
    assert expected is not None
    assert bool((expected == 0).any())
    assert not bool(torch.signbit(expected[expected == 0]).any())
    nowhere = batch.ids.clone()
    nowhere[0], nowhere[1], nowhere[2] = -1, 8, 2**31 - 1
    emptied = workload.expected(batch._replace(ids=nowhere))
    assert emptied is not None
    assert not bool(emptied[:3].view(torch.int16).any())
    assert same_bits(emptied[3:], expected[3:])


@pytest.mark.parametrize("name", SHAPES)
def test_expected_rows_of_all_ranks_sum_to_the_expected_tokens(name: str) -> None:
    workload = workload_of(name)
    batch = workload.tokens(1)
    shares = [workload.expected_rows(rank, batch) for rank in range(2)]
    expected = workload.expected(batch)
    assert expected is not None
    assert shares[0] is not None
    assert shares[1] is not None
    assert torch.equal((shares[0].float() + shares[1].float()).bfloat16(), expected)


def test_oracle_of_no_tokens_is_empty() -> None:
    workload = workload_of("tiny", tokens=0)
    expected = workload.expected(workload.tokens(0))
    assert expected is not None
    assert expected.shape == (0, 256)


@pytest.mark.parametrize("factor", [64.0, float("nan")])
def test_inputs_of_another_plan_are_refused_by_the_oracle(factor: float) -> None:
    plan = plan_exact(256, 128, 4, "bf16", 8)
    batch = workload_of("tiny").tokens(0)
    with pytest.raises(DistbenchError, match="exceeds 256"):
        expert_rows(plan, 0, batch._replace(weights=batch.weights * factor), range(8))
