"""Comparison of bits, not values; digests that depend on positions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from distbench.verify.row_compare import bits_at, compare_rows, row_digests, tensor_digest

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float8_e4m3fn, torch.float8_e4m3fnuz, torch.int32]


def random_rows(dtype: torch.dtype, rows: int = 5, columns: int = 8) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randint(-8, 8, (rows, columns), generator=generator).to(dtype)


def flip(rows: torch.Tensor, row: int, column: int, bit: int) -> torch.Tensor:
    flipped = rows.clone()
    flipped.view(torch.uint8)[row, column * rows.element_size() + bit // 8] ^= 1 << (bit % 8)
    return flipped


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_single_bit_flip_is_found(dtype: torch.dtype) -> None:
    rows = random_rows(dtype)
    for bit in range(8 * rows.element_size()):
        flipped = flip(rows, 2, 5, bit)
        found = compare_rows(flipped, rows)
        assert (found.differing_tokens, found.differing_elements) == (1, 1)
        assert found.max_ulp >= 1
        different = (row_digests(flipped) != row_digests(rows)).any(1)
        assert different.tolist() == [False, False, True, False, False]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_with_the_same_bits_are_equal(dtype: torch.dtype) -> None:
    rows = random_rows(dtype)
    assert compare_rows(rows.clone(), rows).equal
    assert tensor_digest(row_digests(rows.clone())) == tensor_digest(row_digests(rows))


def test_signed_zeros_differ_and_equal_nans_do_not() -> None:
    zero = torch.zeros(1, 1, dtype=torch.bfloat16)
    assert not compare_rows(-zero, zero).equal
    nan = torch.full((1, 1), float("nan"), dtype=torch.bfloat16)
    assert compare_rows(nan.clone(), nan).equal
    assert not compare_rows(flip(nan, 0, 0, 0), nan).equal


def test_neighbouring_floats_are_one_ulp_apart() -> None:
    one = torch.ones(1, 1, dtype=torch.bfloat16)
    assert compare_rows(flip(one, 0, 0, 0), one).max_ulp == 1
    tiny = torch.tensor([[9.2e-41]], dtype=torch.bfloat16)
    assert compare_rows(-tiny, tiny).max_ulp == 2
    assert bits_at(one, 0, 0) == "0x3f80"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_digests_change_with_the_order_of_rows_and_columns(dtype: torch.dtype) -> None:
    rows = random_rows(dtype)
    columns = rows.view(torch.uint8).view(5, 8, -1)
    swapped_columns = columns[:, [1, 0, 2, 3, 4, 5, 6, 7]].reshape(5, -1).view(dtype)
    assert (row_digests(swapped_columns) != row_digests(rows)).any(1).sum() >= 4
    turned = rows.view(torch.uint8)[[1, 0, 2, 3, 4]].view(dtype)
    assert tensor_digest(row_digests(turned)) != tensor_digest(row_digests(rows))


@given(st.integers(0, 2**31), st.integers(1, 40))
def test_two_changes_in_a_row_do_not_cancel_in_its_digest(seed: int, columns: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(-(2**15), 2**15, (1, columns), generator=generator, dtype=torch.int16)
    other = torch.randint(-(2**15), 2**15, (1, columns), generator=generator, dtype=torch.int16)
    assert bool((row_digests(rows) == row_digests(other)).all()) == bool((rows == other).all())


def test_empty_rows_are_equal_and_have_empty_digests() -> None:
    empty = torch.empty(0, 8, dtype=torch.bfloat16)
    assert compare_rows(empty, empty).equal
    assert row_digests(empty).shape == (0, 2)


def test_digest_depends_on_bit_63_of_every_int64_column() -> None:
    """2**63 times an even key is 0 modulo 2**64."""
    rows = torch.zeros(64, 64, dtype=torch.int64)
    flipped = rows.clone()
    flipped.fill_diagonal_(-(2**63))
    assert (row_digests(flipped) != row_digests(rows)).all()
