"""The proof of exactness: any correct kernel gives the oracle's bits."""

from __future__ import annotations

from typing import Literal, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from distbench.errors import DistbenchError
from distbench.models import PRESETS
from distbench.workload import oracle as module
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import make_workload
from distbench.workload.oracle import expert_rows
from distbench.workload.plan import plan_exact
from distbench.workload.quantize import dequantize, quantize_fp8_blocks
from tests.unit.workload.shapes import SHAPES, same_bits, workload_of


class Kernel(NamedTuple):
    """A way to compute the layer: in how many parts a sum is split, what is rounded where, all in random order."""

    splits: int
    round_partials: bool
    one_stage: bool
    weight_in_stage_1: bool
    atomic: bool
    requantize: torch.dtype | None
    order: torch.Generator

    @staticmethod
    def drawn(seed: int, *, requantize: torch.dtype | None) -> Kernel:
        order = torch.Generator().manual_seed(seed)
        splits = int(torch.randint(1, 9, (1,), generator=order))
        rounded, one_stage, weighted, atomic, again = (torch.rand(5, generator=order) < 0.5).tolist()
        return Kernel(splits, rounded, one_stage, weighted, atomic, requantize if again else None, order)

    def layer(self, batch: TokenBatch, w1: Tensor, w2: Tensor, first: int = 0) -> Tensor:
        hidden = dequantize(batch.hidden, batch.scales)
        total = torch.zeros_like(hidden)
        for route in torch.randperm(batch.ids.numel(), generator=self.order).tolist():
            token, slot = divmod(route, batch.ids.shape[1])
            expert = int(batch.ids[token, slot]) - first
            if 0 <= expert < w1.shape[0]:
                total[token] += self.expert(hidden[token], w1[expert], w2[expert], batch.weights[token, slot])
                if self.atomic:
                    total[token] = total[token].bfloat16().float()
        return total.bfloat16()

    def expert(self, hidden: Tensor, w1: Tensor, w2: Tensor, weight: Tensor) -> Tensor:
        gate, up = self.product(hidden, w1.float()).chunk(2)
        activation = functional.silu(gate) * up
        if self.weight_in_stage_1:
            activation = activation * weight
        if not self.one_stage:
            activation = activation.bfloat16().float()
        if self.requantize is not None:
            activation = dequantize(*quantize_fp8_blocks(activation.unsqueeze(0), self.requantize))[0]
        result = self.product(activation, w2.float())
        return result if self.weight_in_stage_1 else (result.bfloat16() * weight).bfloat16().float()

    def product(self, row: Tensor, weight: Tensor) -> Tensor:
        total = torch.zeros(weight.shape[0])
        for columns in torch.randperm(row.numel(), generator=self.order).tensor_split(self.splits):
            total += weight[:, columns] @ row[columns]
            if self.round_partials:
                total = total.bfloat16().float()
        return total


@pytest.mark.parametrize("name", SHAPES)
@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 2**62))
def test_every_order_of_sums_gives_the_bits_of_the_oracle(name: str, seed: int) -> None:
    workload = workload_of(name, seed, tokens=2)
    batch = workload.tokens(1)
    w1, w2 = (torch.cat(parts) for parts in zip(*(workload.local_weights(rank) for rank in range(2)), strict=True))
    expected = workload.expected(batch)
    kernel = Kernel.drawn(seed, requantize=workload.fp8 if name in ("tiny fp8", "tiny fnuz") else None)
    assert expected is not None
    assert same_bits(kernel.layer(batch, w1, w2), expected)


def test_gaussian_inputs_would_tell_those_kernels_apart() -> None:
    workload = make_workload(
        numerics="gaussian",
        hidden_size=256,
        intermediate_size=128,
        num_experts=8,
        topk=4,
        ep_size=1,
        seed=0,
        routing="uniform",
        tokens_per_rank=(2,),
        dispatch_dtype="bf16",
        device="cpu",
    )
    made = [
        Kernel.drawn(seed, requantize=None).layer(workload.tokens(0), *workload.local_weights(0)) for seed in (1, 2)
    ]
    assert not same_bits(*made)


@pytest.mark.parametrize("dtype", ["bf16", "e4m3fn", "e4m3fnuz"])
@pytest.mark.parametrize("seed", range(6))
def test_full_size_qwen_expert(dtype: Literal["bf16", "e4m3fn", "e4m3fnuz"], seed: int) -> None:
    shape = PRESETS["qwen3-30b-a3b"]
    workload = make_workload(
        numerics="exact",
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_experts=128,
        topk=8,
        ep_size=128,
        seed=seed,
        routing="hot-rank:77",
        tokens_per_rank=(2,) * 128,
        dispatch_dtype="bf16" if dtype == "bf16" else "fp8",
        fp8_format="e4m3fn" if dtype == "bf16" else dtype,
        device="cpu",
    )
    batch = workload.tokens(3)
    expected = workload.expected_rows(77, batch)
    assert expected is not None
    assert bool(expected.any(1).all())
    kernel = Kernel.drawn(seed, requantize=None if dtype == "bf16" else workload.fp8)
    assert same_bits(kernel.layer(batch, *workload.local_weights(77), first=77), expected)


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("routing", ["uniform", "zipf:1.5"])
def test_large_batches_agree_with_a_dense_product(name: str, routing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    workload = workload_of(name, 3, routing, tokens=60)
    batch = workload.tokens(0)
    wide = dequantize(batch.hidden, batch.scales).double()
    total = torch.zeros_like(wide)
    for expert in range(workload.group.num_experts):
        w1, w2 = (part[0].double() for part in workload.numerics.dense_weights(torch.tensor([expert])))
        gate, up = (wide @ w1.t()).chunk(2, dim=1)
        share = ((batch.ids == expert) * batch.weights).sum(1, keepdim=True)
        total += (gate * up) @ w2.t() * share
    expected = workload.expected(batch)
    assert expected is not None
    assert same_bits(expected, (total + 0.0).bfloat16())
    for limit in ("_CHUNK_BYTES", "_BLOCK_BYTES"):
        monkeypatch.setattr(module, limit, 40_000)
        again = workload.expected(batch)
        assert again is not None
        assert same_bits(again, expected)


def test_zeros_are_positive_and_rows_without_experts_are_zero() -> None:
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
def test_the_shares_of_the_ranks_add_up(name: str) -> None:
    workload = workload_of(name)
    batch = workload.tokens(1)
    shares = [workload.expected_rows(rank, batch) for rank in range(2)]
    expected = workload.expected(batch)
    assert expected is not None
    assert shares[0] is not None
    assert shares[1] is not None
    assert torch.equal((shares[0].float() + shares[1].float()).bfloat16(), expected)


def test_no_tokens() -> None:
    workload = workload_of("tiny", tokens=0)
    expected = workload.expected(workload.tokens(0))
    assert expected is not None
    assert expected.shape == (0, 256)


@pytest.mark.parametrize("factor", [64.0, float("nan")])
def test_inputs_of_another_plan_are_noticed(factor: float) -> None:
    plan = plan_exact(256, 128, 4, "bf16", 8)
    batch = workload_of("tiny").tokens(0)
    with pytest.raises(DistbenchError, match="allowed are 256"):
        expert_rows(plan, 0, batch._replace(weights=batch.weights * factor), range(8))
