"""The stand-in's arithmetic: in any precision, the bits of a block are those of float64 rounded once."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distbench.experts.blocked_matmul import Weights, _step, blocked_product

EXPERTS, ROWS, COLUMNS, OUT = 3, 5, 96, 7


def problem(seed: int, kind: str) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    if kind == "gaussian":
        rows = torch.randn(EXPERTS, ROWS, COLUMNS, generator=generator).bfloat16().float()
        return rows, torch.randn(EXPERTS, OUT, COLUMNS, generator=generator).bfloat16()
    rows = torch.randint(-7, 8, (EXPERTS, ROWS, COLUMNS), generator=generator) * 0.25
    weights = torch.randint(-64, 65, (EXPERTS, OUT, COLUMNS), generator=generator) * 1.0
    if kind == "sparse":
        weights[torch.rand(weights.shape, generator=generator) > 0.03] = 0.0
    return rows, weights.bfloat16()


def in_float64(rows: Tensor, weights: Tensor, tile_k: int, splits: int) -> Tensor:
    blocks = [
        torch.einsum("gmk,gnk->gmn", rows[..., k : k + tile_k].double(), weights[..., k : k + tile_k].double()).float()
        for k in range(0, rows.shape[2], tile_k)
    ]
    run = -(-rows.shape[2] // (tile_k * splits))
    total = torch.zeros_like(blocks[0])
    for start in range(0, len(blocks), run):
        part = torch.zeros_like(total)
        for block in blocks[start : start + run]:
            part += block
        total += part
    return total


@settings(deadline=None)
@given(
    seed=st.integers(0, 1 << 30),
    kind=st.sampled_from(["gaussian", "dense", "sparse"]),
    tile_k=st.sampled_from([16, 32, 40, 64, 96, 128]),
    splits=st.integers(1, 4),
)
def test_block_products_are_rounded_once_and_added_in_order(seed: int, kind: str, tile_k: int, splits: int) -> None:
    rows, weights = problem(seed, kind)
    held = Weights(weights)
    everyone = torch.arange(EXPERTS)
    assert (held.exact_product(rows, everyone) is not None) == (kind == "sparse")
    expected = in_float64(rows, weights, tile_k, splits)
    product = blocked_product(rows, held, everyone, tile_k, splits)
    assert torch.equal(product.contiguous().view(torch.int32), expected.view(torch.int32))
    some = torch.tensor([2, 0])
    assert torch.equal(blocked_product(rows[some], held, some, tile_k, splits), expected[some])


def test_sparse_weights_skip_zero_columns_and_unbounded_rows_read_all() -> None:
    rows, weights = problem(1, "sparse")
    held = Weights(weights)
    zero_column = (weights[0] == 0).all(0).nonzero()[0, 0]
    rows[0, 0, zero_column] = math.nan
    product = blocked_product(rows, held, torch.arange(EXPERTS), 32, 1)
    assert product[0, 0].isnan().all()
    assert not product[0, 1:].isnan().any()


@pytest.mark.parametrize("columns", [12, 10, 7])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_sparse_weights_accept_any_column_count_and_zero_rows(dtype: torch.dtype, columns: int) -> None:
    weights = torch.zeros(2, 3, columns, dtype=dtype)
    weights[0, 1, columns - 1], weights[1, 2, 0] = -3.0, -0.0
    rows = torch.arange(2 * 4 * columns).view(2, 4, columns) * 1.0
    product = Weights(weights).exact_product(rows, torch.arange(2))
    assert product is not None
    expected = in_float64(rows, weights, columns, 1)
    assert torch.equal(product.contiguous().view(torch.int32), expected.view(torch.int32))


@pytest.mark.parametrize(
    ("values", "step"),
    [
        ([0.25, -3.0], 0.25),
        ([48.0, 80.0], 16.0),
        ([0.0, 48.0], 1.0),
        ([13 / 32, 2.0], 2.0**-5),
        ([1e-40, 1.0], None),
        ([math.nan, 1.0], None),
        ([math.inf, 1.0], None),
    ],
)
def test_step_of_values_is_the_largest_power_of_two_that_divides_them(values: list[float], step: float | None) -> None:
    assert _step(torch.tensor(values)) == step


def test_sums_beyond_the_exact_float32_range_use_float64() -> None:
    weights = torch.zeros(1, 1, 64)
    weights[0, 0, ::16] = 128.0
    held = Weights(weights.bfloat16())
    most = 2.0**24 / 4
    assert held.exact_product(torch.full((1, 1, 64), most), torch.arange(1)) is not None
    assert held.exact_product(torch.full((1, 1, 64), most + 1), torch.arange(1)) is None
    assert held.exact_product(torch.full((1, 1, 64), most / 4 + 0.25), torch.arange(1)) is None


@settings(deadline=None)
@given(seed=st.integers(0, 1 << 30))
def test_single_entry_rows_are_exact_for_any_value_and_others_for_whole_steps(seed: int) -> None:
    """As in an exact layer: some weight rows read one column of any values, others read columns of integers."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(EXPERTS, ROWS, COLUMNS, generator=generator)
    whole = torch.randperm(COLUMNS, generator=generator)[: COLUMNS // 2]
    rows[:, :, whole] = torch.randint(-64, 65, (EXPERTS, ROWS, len(whole)), generator=generator) / 4
    weights = torch.zeros(EXPERTS, OUT, COLUMNS)
    weights[:, 0, whole[:9]] = torch.randint(-9, 10, (EXPERTS, 9), generator=generator) * 13 / 32
    for row in range(1, OUT):
        weights[:, row, torch.randint(COLUMNS, (), generator=generator)] = 1.25
    held = Weights(weights.bfloat16())
    expected = in_float64(rows, weights, 32, 2)
    assert held.exact_product(rows, torch.arange(EXPERTS)) is not None
    product = blocked_product(rows, held, torch.arange(EXPERTS), 32, 2)
    assert torch.equal(product.contiguous().view(torch.int32), expected.view(torch.int32))
    rows[0, 0, whole[0]] += 2.0**-9
    weights[0, 0, whole[0]] = 1.0
    assert Weights(weights.bfloat16()).exact_product(rows, torch.arange(EXPERTS)) is None
