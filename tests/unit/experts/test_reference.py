"""The stand-in's arithmetic: whatever precision a block is taken in, its bits are those of float64 rounded once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distbench.experts.reference import _largest, _Weights, blocked_product, grouped_routes, local_experts

EXPERTS, ROWS, COLUMNS, OUT = 3, 5, 96, 7


def problem(seed: int, *, whole: bool) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if whole:
        rows = torch.randint(-7, 8, (EXPERTS, ROWS, COLUMNS), generator=generator) * 0.25
        return rows, (torch.randint(-64, 65, (EXPERTS, OUT, COLUMNS), generator=generator) * 1.0).bfloat16()
    rows = torch.randn(EXPERTS, ROWS, COLUMNS, generator=generator).bfloat16().float()
    return rows, torch.randn(EXPERTS, OUT, COLUMNS, generator=generator).bfloat16()


def in_float64(rows: Tensor, weights: Tensor, tile_k: int, splits: int) -> Tensor:
    blocks = [
        torch.einsum("gmk,gnk->gmn", rows[..., k : k + tile_k].double(), weights[..., k : k + tile_k].double()).float()
        for k in range(0, COLUMNS, tile_k)
    ]
    run = -(-COLUMNS // (tile_k * splits))
    total = torch.zeros_like(blocks[0])
    for start in range(0, len(blocks), run):
        part = torch.zeros_like(total)
        for block in blocks[start : start + run]:
            part += block
        total += part
    return total


@given(
    seed=st.integers(0, 1 << 30),
    whole=st.booleans(),
    tile_k=st.sampled_from([16, 32, 40, 64, 96, 128]),
    splits=st.integers(1, 4),
)
def test_blocks_are_rounded_once_and_added_in_order(seed: int, tile_k: int, splits: int, *, whole: bool) -> None:
    rows, weights = problem(seed, whole=whole)
    held = _Weights(weights)
    assert held.exact_with(rows) == whole
    product = blocked_product(rows, held, torch.arange(EXPERTS), tile_k, splits)
    expected = in_float64(rows, weights, tile_k, splits)
    assert torch.equal(product.view(torch.int32), expected.view(torch.int32))
    some = torch.tensor([2, 0])
    assert torch.equal(blocked_product(rows[some], held, some, tile_k, splits), expected[some])


@pytest.mark.parametrize(
    ("values", "largest"),
    [
        ([0.25, -3.0], 3.0),
        ([-0.0], 0.0),
        ([0.125, 1.0], math.inf),
        ([1e-40, 1.0], math.inf),
        ([math.nan, 1.0], math.inf),
        ([math.inf, 1.0], math.inf),
        ([], math.inf),
    ],
)
def test_only_multiples_of_a_step_have_a_bound(values: list[float], largest: float) -> None:
    assert _largest(torch.tensor(values)) == largest


def test_sums_past_what_float32_holds_are_taken_in_float64() -> None:
    weights = _Weights(torch.full((1, 1, 64), 128.0).bfloat16())
    most = 2.0**20 / 128 / 64
    assert weights.exact_with(torch.full((1, 1, 64), most))
    assert not weights.exact_with(torch.full((1, 1, 64), most + 0.25))


def test_routes_are_grouped_by_local_expert_in_their_order() -> None:
    ids = torch.tensor([[5, 2], [-1, 4], [2, 0x7FFF_0000], [6, 7], [2, 3]], dtype=torch.int32)
    mask = torch.tensor([0, 0, 1, 0, 1, 1, 0, 0], dtype=torch.int32)
    local = local_experts(ids, mask).flatten()
    assert local.tolist() == [2, 0, -1, 1, 0, -1, -1, -1, 0, -1]
    whole, *_ = grouped_routes(local, 3, 1)
    assert whole.experts.tolist() == [0, 1, 2]
    assert whole.routes.tolist() == [[1, 4, 8], [3, 10, 10], [0, 10, 10]]
    parts = list(grouped_routes(local, 3, 8 << 20))
    assert [part.experts.tolist() for part in parts] == [[0], [1], [2]]
    assert list(grouped_routes(torch.full((4,), -1), 3, 1)) == []
