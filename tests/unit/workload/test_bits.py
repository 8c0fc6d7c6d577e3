"""The counter-based bits: frozen values, independence of slices, and no visible structure."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distbench.workload import bits
from distbench.workload.bits import (
    RowShuffles,
    byte_columns,
    permuted,
    positive_words,
    shuffle,
    smallest,
    words,
    words_of_streams,
)

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
BIT = torch.arange(32)


def bits_of(values: Tensor) -> Tensor:
    return (values.unsqueeze(-1) >> BIT) & 1


@pytest.mark.parametrize("device", DEVICES)
def test_counter_based_words_equal_their_golden_values(device: str) -> None:
    rows = torch.tensor([0, 1, 2**31 - 1, (5 << 31) | 7], device=device)
    found = words(0, "golden", rows, 3, device)
    assert found.dtype == torch.int32
    assert found.tolist() == [
        [-1076954771, -793951680, -75749866],
        [1287625479, 1345264863, -1603054459],
        [46667871, 1515353098, 177344914],
        [338284738, 2098257392, 880846280],
    ]
    drawn = words(2**62, "golden", torch.arange(50), 30, device)
    assert (
        hashlib.sha256(bytes(drawn.cpu().view(torch.uint8).flatten().tolist())).hexdigest()[:16] == "040938c119657a53"
    )
    assert shuffle(3, "golden", 1, 8, device).tolist() == [3, 1, 5, 7, 0, 6, 4, 2]


def slow_word(seed: int, tensor: str, row: int, column: int) -> int:
    """One word, computed with Python integers."""
    key = hashlib.sha256(f"distbench/{seed}/{tensor}".encode()).digest()
    state = row ^ int.from_bytes(key[:8], "little")
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
        state = (state ^ (state >> shift)) * factor % 2**64
    low, high = state % 2**32, state >> 32
    value = low ^ ((column * 0x9E3779B9 + int.from_bytes(key[8:12], "little")) % 2**32)
    value = ((value ^ (value >> 16)) * 0x7FEB352D + high) % 2**32
    value = (value ^ (value >> 15)) * 0x846CA68B % 2**32
    return value ^ (value >> 16)


@given(st.integers(0, 2**62 - 1), st.integers(0, 2**62), st.text("abc/", max_size=5))
def test_words_equal_a_scalar_model_with_wraparound(row: int, seed: int, tensor: str) -> None:
    wanted = [[slow_word(seed, tensor, row, column) for column in range(20)]]
    assert positive_words(seed, tensor, torch.tensor([row]), 20, "cpu").tolist() == wanted


@given(st.lists(st.integers(0, 2**62 - 1), min_size=1, max_size=6), st.integers(1, 40), st.integers(0, 2**62))
def test_words_of_any_slice_equal_those_of_the_whole(rows: list[int], columns: int, seed: int) -> None:
    whole = words(seed, "t", torch.tensor(rows), columns, "cpu")
    for place, row in enumerate(rows):
        assert torch.equal(words(seed, "t", torch.tensor([row]), columns + 3, "cpu")[0, :columns], whole[place])


def test_words_differ_between_streams_and_seeds() -> None:
    rows = torch.arange(4)
    drawn = [words(seed, stream, rows, 8, "cpu") for seed in (0, 1) for stream in ("a", "b")]
    assert len({tuple(part.flatten().tolist()) for part in drawn}) == 4


def test_row_indices_passed_to_words_are_not_modified() -> None:
    rows = torch.arange(4)
    words(0, "a", rows, 8, "cpu")
    assert rows.tolist() == [0, 1, 2, 3]


def test_byte_columns_are_the_bytes_of_the_words_in_order() -> None:
    whole = positive_words(1, "t", torch.arange(3), 2, "cpu")
    parts = byte_columns(1, "t", torch.arange(3), 7, "cpu").long()
    assert parts.shape == (3, 7)
    assert torch.equal(parts[:, 4:], torch.stack([(whole[:, 1] >> shift) & 255 for shift in (0, 8, 16)], dim=1))


def test_every_bit_is_balanced_overall_in_rows_and_in_columns() -> None:
    bits = bits_of(words(0, "balance", torch.arange(1024), 512, "cpu")).float()
    assert float((bits.mean((0, 1)) - 0.5).abs().max()) < 5 * 0.5 / (1024 * 512) ** 0.5
    assert float((bits.mean((1, 2)) - 0.5).abs().max()) < 5 * 0.5 / (512 * 32) ** 0.5
    assert float((bits.mean((0, 2)) - 0.5).abs().max()) < 5 * 0.5 / (1024 * 32) ** 0.5


@pytest.mark.parametrize("stride", [1, 2, 64, 1 << 20, 1 << 31])
def test_neighbouring_rows_and_columns_are_uncorrelated(stride: int) -> None:
    signs = bits_of(words(0, "pairs", torch.arange(256) * stride, 256, "cpu")).float() * 2 - 1
    bound = 6 / (256 * 256) ** 0.5
    assert float((signs[1:] * signs[:-1]).mean((0, 1)).abs().max()) < bound
    assert float((signs[:, 1:] * signs[:, :-1]).mean((0, 1)).abs().max()) < bound
    assert float((signs[:, 4:] * signs[:, :-4]).mean((0, 1)).abs().max()) < bound
    assert float((signs[..., 1:] * signs[..., :-1]).mean((0, 1)).abs().max()) < bound


def test_whole_rows_are_pairwise_uncorrelated() -> None:
    signs = (bits_of(words(0, "rows", torch.arange(200), 128, "cpu")).float() * 2 - 1).flatten(1)
    product = signs @ signs.t() / signs.shape[1]
    product.fill_diagonal_(0)
    assert float(product.abs().max()) < 6 / signs.shape[1] ** 0.5


@pytest.mark.parametrize("bit", range(0, 62, 3))
def test_flipping_a_bit_of_the_row_index_flips_half_of_all_bits(bit: int) -> None:
    rows = torch.arange(64) * 977 + (3 << 33)
    changed = words(0, "flip", rows, 64, "cpu") ^ words(0, "flip", rows ^ (1 << bit), 64, "cpu")
    assert float((bits_of(changed).float().mean((0, 1)) - 0.5).abs().max()) < 6 * 0.5 / (64 * 64) ** 0.5


@pytest.mark.parametrize("bit", range(12))
def test_flipping_a_bit_of_the_column_index_flips_half_of_all_bits(bit: int) -> None:
    drawn = words(0, "flip", torch.arange(16), 1 << 12, "cpu")
    changed = drawn ^ drawn[:, torch.arange(1 << 12) ^ (1 << bit)]
    assert float((bits_of(changed).float().mean((0, 1)) - 0.5).abs().max()) < 6 * 0.5 / (1 << 16) ** 0.5


def test_many_rows_are_pairwise_distinct() -> None:
    rows = torch.cat([torch.arange(1 << 17), (torch.arange(1 << 17) << 31) | 12345])
    pairs = words(0, "unique", rows, 2, "cpu").long()
    keys = (pairs[:, 0] << 32) ^ (pairs[:, 1] & 0xFFFF_FFFF)
    assert torch.unique(keys).numel() == rows.unique().numel()


def test_byte_values_are_uniform_by_chi_square() -> None:
    counts = torch.bincount(byte_columns(0, "chi", torch.arange(256), 4096, "cpu").flatten().long(), minlength=256)
    expected = 256 * 4096 / 256
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - 255) < 6 * (2 * 255) ** 0.5


@given(st.integers(0, 300), st.integers(0, 2**40))
def test_shuffle_is_a_permutation(count: int, row: int) -> None:
    assert sorted(shuffle(0, "p", row, count, "cpu").tolist()) == list(range(count))


def test_shuffle_positions_are_uniform() -> None:
    drawn = torch.stack([shuffle(0, "p", row, 6, "cpu") for row in range(3000)])
    for place in range(6):
        counts = torch.bincount(drawn[:, place], minlength=6).float()
        assert float((counts - 500).abs().max()) < 6 * (500 * 5 / 6) ** 0.5


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.data())
def test_smallest_breaks_ties_by_column(keys: list[int], data: st.DataObject) -> None:
    count = data.draw(st.integers(1, len(keys)))
    wanted = sorted(range(len(keys)), key=lambda column: (keys[column], column))[:count]
    assert smallest(torch.tensor([keys]), count).tolist() == [wanted]


@given(st.lists(st.integers(-(1 << 63), (1 << 63) - 1), min_size=1, max_size=20))
def test_keys_of_one_row_are_those_of_many(rows: list[int]) -> None:
    many = bits._row_keys(torch.tensor(rows)).view(torch.int32).view(-1, 2)  # noqa: SLF001 - two ways to one key
    assert [bits._row_key(row) for row in rows] == [tuple(keys) for keys in many.tolist()]  # noqa: SLF001 - as above


def test_permutations_of_a_stream_are_those_of_its_words() -> None:
    drawn = words_of_streams(5, ["one", "two"], torch.full((2, 1), 3), 40).squeeze(1).long() & 0xFFFF_FFFF
    assert torch.equal(bits.shuffles(5, ["one", "two"], 3, 40, "cpu"), drawn.argsort(dim=1, stable=True))


def test_orders_of_rows_come_in_turn_and_each_holds_every_element_of_its_row() -> None:
    orders = RowShuffles(1, "adds")
    made = [orders.next(7, 4, torch.device("cpu")).view(7, 4) for _ in range(6)]
    for order in made:
        assert torch.equal(order.sort(1).values, torch.arange(28).view(7, 4))
    assert len({tuple(order.flatten().tolist()) for order in made}) == 6
    for turn, order in enumerate(made):
        keys = bits.shuffle(1, f"adds/{turn}", 0, 28, "cpu").view(7, 4)
        assert torch.equal(order, keys.argsort(1) + torch.arange(0, 28, 4).unsqueeze(1))
    assert orders.next(3, 2, torch.device("cpu")).view(3, 2).sort(1).values.tolist() == [[0, 1], [2, 3], [4, 5]]


def test_keyed_permutation_is_injective() -> None:
    numbers = torch.cat([torch.arange(100_000), torch.arange((1 << 32) - 1000, 1 << 32)])
    made = permuted(3, "one", numbers)
    assert made.dtype == torch.int32
    assert len(torch.unique(made)) == len(numbers)
    assert torch.equal(permuted(3, "one", numbers[70:90]), made[70:90])
    assert not torch.equal(permuted(4, "one", numbers), made)
    assert not torch.equal(permuted(3, "two", numbers), made)
