"""Random bits from a counter: value = hash(seed, tensor, row, column); any rank computes any slice.

Integer arithmetic only (products that wrap, logical shifts), hence the same bits on CPU, CUDA and ROCm. A row gets two
32-bit keys from the finaliser of splitmix64 (Steele, Lea, Flood, "Fast splittable pseudorandom number generators",
2014); with them, `lowbias32` (Chris Wellons, "Prospecting for hash functions", 2018) mixes the column. With a single
32-bit key, whole rows would repeat after about 2**16 rows.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

Device = torch.device | str

_GOLDEN = 0x9E3779B9 - (1 << 32)
_INDEX_BITS = 24
_ALL_BITS = (1 << 64) - 1
_COUNT_BITS = 31
# Permutations of a stream that are drawn in one call: a draw costs about 20 operations, whether for one or for many.
_DRAWN = 4


def words(seed: int, tensor: str, rows: Tensor, columns: int, device: Device) -> Tensor:
    """Return 32 random bits for each row and column: int32 [r, columns] on `device`.

    `tensor` names an independent stream of `seed`. `rows` int64 [r] may hold any numbers in any order; distinct rows
    have distinct keys.
    """
    row_key, column_key = _stream_keys(seed, tensor)
    first, second = _row_keys(rows.to(device) ^ row_key).view(torch.int32).view(-1, 2, 1).unbind(1)
    return _mix((_steps(columns, torch.device(device)) + column_key) ^ first, second)


def _mix(values: Tensor, second: Tensor | int) -> Tensor:
    """Mix int32 `values` in place by lowbias32, with a second key added midway."""
    _fold(values, 16)
    values *= _constant(0x7FEB352D, torch.int32)
    values += second
    _fold(values, 15)
    values *= _constant(0x846CA68B, torch.int32)
    return _fold(values, 16)


def words_of_streams(seed: int, names: Sequence[str], rows: Tensor, columns: int) -> Tensor:
    """Return the `words` of several streams, rows int64 [s, r] of each: int32 [s, r, columns] on their device."""
    row_keys, column_keys = zip(*(_stream_keys(seed, name) for name in names), strict=True)
    keys = rows ^ torch.tensor(row_keys, device=rows.device).unsqueeze(1)
    first, second = _row_keys(keys).view(torch.int32).view(*rows.shape, 2, 1).unbind(2)
    starts = torch.tensor(column_keys, dtype=torch.int32, device=rows.device).view(-1, 1, 1)
    return _mix((_steps(columns, rows.device) + starts) ^ first, second)


def permuted(seed: int, tensor: str, numbers: Tensor) -> Tensor:
    """Return a keyed permutation of 32-bit numbers, int32 [n], of numbers int64 [n] from 0 to 2**32 - 1."""
    row_key, column_key = _stream_keys(seed, tensor)
    first, second = _row_key(row_key)
    spread = (numbers * _GOLDEN + column_key).to(torch.int32)
    return _mix(spread ^ first, second)


def positive_words(seed: int, tensor: str, rows: Tensor, columns: int, device: Device) -> Tensor:
    """Return `words` as unsigned numbers, 0 to 2**32 - 1: int64 [r, columns]."""
    return words(seed, tensor, rows, columns, device).long() & 0xFFFF_FFFF


def byte_columns(seed: int, tensor: str, rows: Tensor, columns: int, device: Device) -> Tensor:
    """Return 8 random bits for each row and column, four columns to a word: uint8 [r, columns]."""
    return words(seed, tensor, rows, -(-columns // 4), device).view(torch.uint8)[:, :columns]


def smallest(keys: Tensor, count: int) -> Tensor:
    """Return the columns of each row's `count` smallest keys, smallest first: int64 [m, count].

    keys int64 [m, n], from 0 to 2**39 - 1. Ties go to the lower column, so the result is the same on every device.
    """
    unique = (keys << _INDEX_BITS) | torch.arange(keys.shape[1], device=keys.device)
    return unique.topk(count, dim=1, largest=False, sorted=True).values & ((1 << _INDEX_BITS) - 1)


def shuffle(seed: int, name: str, row: int, count: int, device: Device) -> Tensor:
    """Return a permutation of 0 to `count` - 1, int64 [count]: row `row` of the stream `name`."""
    return shuffles(seed, [name], row, count, device)[0]


def shuffles(seed: int, names: Sequence[str], row: int, count: int, device: Device) -> Tensor:
    """Return the `shuffle` of each of these streams, int64 [names, count]."""
    streams = [_stream_keys(seed, name) for name in names]
    table = [(column_key, *_row_key(row_key ^ row)) for row_key, column_key in streams]
    starts, first, second = torch.tensor(table, dtype=torch.int32, device=device).split(1, dim=1)
    keys = _mix((_steps(count, torch.device(device)) + starts) ^ first, second).long()
    keys &= 0xFFFF_FFFF
    keys <<= _COUNT_BITS
    keys |= torch.arange(count, device=device)
    return keys.argsort(dim=1)


class RowShuffles:
    """Successive random orders of the elements of rows, of the size each call asks for; equal sizes cost least."""

    def __init__(self, seed: int, stream: str) -> None:
        self._seed, self._stream = seed, stream
        self._taken = 0
        self._ahead: list[Tensor] = []
        self._size = 0, 0

    def next(self, rows: int, width: int, device: Device) -> Tensor:
        """Return the next order: row by row the indices of its elements in the flat matrix, int64 [rows * width]."""
        if not self._ahead or self._size != (rows, width):
            self._size = rows, width
            self._ahead = [*_drawn(self._seed, self._stream, self._taken, self._size, device)][::-1]
        self._taken += 1
        return self._ahead.pop()


@lru_cache(maxsize=2)
def _drawn(seed: int, stream: str, first: int, size: tuple[int, int], device: Device) -> tuple[Tensor, ...]:
    """Return some successive orders, which both kinds of inputs of a case share; they must not be written to."""
    rows, width = size
    names = [f"{stream}/{turn}" for turn in range(first, first + _DRAWN)]
    order = shuffles(seed, names, 0, rows * width, device).view(_DRAWN, rows, width).argsort(2)
    order += torch.arange(0, rows * width, width, device=device).unsqueeze(1)
    return order.flatten(1).unbind(0)


def _row_keys(rows: Tensor) -> Tensor:
    """Mix int64 `rows` in place, bijectively, by the finaliser of splitmix64."""
    _fold(rows, 30)
    rows *= _constant(0xBF58476D1CE4E5B9, torch.int64)
    _fold(rows, 27)
    rows *= _constant(0x94D049BB133111EB, torch.int64)
    return _fold(rows, 31)


def _row_key(word: int) -> tuple[int, int]:
    """Return `_row_keys` of one row without operations of torch: both keys, as signed 32-bit numbers."""
    word &= _ALL_BITS
    word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 & _ALL_BITS
    word = (word ^ word >> 27) * 0x94D049BB133111EB & _ALL_BITS
    word ^= word >> 31
    return _signed(word & 0xFFFF_FFFF, 32), _signed(word >> 32, 32)


def _fold(values: Tensor, shift: int) -> Tensor:
    """XOR the bits above `shift` into those below, in place; the shift is logical."""
    dtype = values.dtype
    shifted = values >> _constant(shift, dtype)
    shifted &= _constant((1 << (8 * dtype.itemsize - shift)) - 1, dtype)
    values ^= shifted
    return values


@lru_cache(maxsize=32)
def _constant(word: int, dtype: torch.dtype) -> Tensor:
    """Return an unsigned number as a cached tensor, which saves each operation from making one."""
    return torch.tensor(_signed(word, 8 * dtype.itemsize), dtype=dtype)


def _signed(word: int, width: int) -> int:
    return word - (1 << width) if word >> (width - 1) else word


@lru_cache(maxsize=16)
def _steps(columns: int, device: torch.device) -> Tensor:
    """Multiples of the golden ratio, which spread neighbouring columns apart: int32 [columns]."""
    return torch.arange(columns, dtype=torch.int32, device=device) * _GOLDEN


@lru_cache(maxsize=1024)
def _stream_keys(seed: int, tensor: str) -> tuple[int, int]:
    digest = hashlib.sha256(f"distbench/{seed}/{tensor}".encode()).digest()
    row_key, column_key = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:12], "little")
    return _signed(row_key, 64), _signed(column_key, 32)
