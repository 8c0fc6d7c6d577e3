"""Rows times weights, with the bits of a kernel that walks K in blocks; a shorter way where no order of adding rounds.

Few entries of a row of exact weights are not zero (`distbench.workload.exact`). A row with one of them has the product
itself, rounded once, whatever the numbers are. A row with several reads whole multiples of a step, of which float32
adds up so many without rounding. So what is zero need not be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_WIDE_BYTES = 8 << 20
# Weights are sparse where at most one in so many of their words of 64 bits is not zero.
_SPARSE = 4
# The mode of embedding_bag that sums.
_SUM = 0
_INTEGERS = {2: torch.int16, 4: torch.int32}
# float32 holds whole multiples of a step up to so many of it.
_WHOLE = 2.0**24
# Steps that are looked for in rows, and the smallest one in weights.
_STEPS = (1.0, 0.25, 2.0**-7)
_SMALLEST = 2.0**-40
# As float32 has exponents: that of 2**23, the unit of whose mantissa is 1, and that of infinities and NaN.
_EXPONENT_OF_2_23, _NOT_FINITE = 150, 255


class _Entries(NamedTuple):
    """What is not zero in weights [El, N, K]: in order of expert and row, `counts` int64 [El, N] of each.

    columns int64 [e] count on from expert to expert, K for each; values float32 [e]; `starts` int64 [El * N] are where
    rows begin in them. `shared` bool [K] are the columns that any row with several entries reads. What is read there
    makes exact products if it is whole multiples of a step and at most `most` of them.
    """

    counts: Tensor
    columns: Tensor
    values: Tensor
    starts: Tensor
    shared: Tensor
    most: float

    def suit(self, rows: Tensor) -> bool:
        """Whether products with rows float32 [g, m, K] are exact in any order."""
        flat = rows.flatten(0, 1)
        if not flat.numel():
            return False
        largest = flat.abs().amax(0)
        if not float(largest.amax()) < math.inf:
            return False
        most = float((largest * self.shared).amax())
        return any(
            most <= self.most * step and float((_fractions(flat, step) * self.shared).amax()) == 0 for step in _STEPS
        )

    def of(self, experts: Tensor, width: int) -> _Entries:
        """Return those of `experts` [g] alone, whose columns count on in that order; `width` is K."""
        sizes = self.counts.sum(1).tolist()
        columns, values = self.columns.split(sizes), self.values.split(sizes)
        wanted = experts.tolist()
        return _Entries(
            self.counts[experts],
            torch.cat([columns[expert] + (place - expert) * width for place, expert in enumerate(wanted)]),
            torch.cat([values[expert] for expert in wanted]),
            _starts(self.counts[experts]),
            self.shared,
            self.most,
        )


class Weights:
    """One stage's weights [El, N, K], bf16 or float32, as `blocked_product` wants them."""

    def __init__(self, weights: Tensor) -> None:
        """Look through `weights`, which nobody may write to from here on."""
        self.rows = weights.shape[1]
        self._weights = weights
        self._wide: Tensor | None = None
        self._entries = _entries_of(weights)

    def exact_product(self, rows: Tensor, experts: Tensor) -> Tensor | None:
        """Return rows float32 [g, m, K] times the weights of `experts` [g], float32 [g, m, N]; None where it rounds."""
        entries = self._entries
        if entries is None or not entries.suit(rows):
            return None
        count, num_rows, width = rows.shape
        if count < entries.counts.shape[0]:
            entries = entries.of(experts, width)
        table = rows.transpose(1, 2).reshape(count * width, num_rows)
        sums, *_ = torch.embedding_bag(
            table, entries.columns, entries.starts, mode=_SUM, per_sample_weights=entries.values
        )
        return sums.view(count, self.rows, num_rows).transpose(1, 2)

    def blocks(self, experts: Tensor, tile_k: int) -> Iterator[Tensor]:
        """Yield float64 [g, at most tile_k, N] of `experts`, one block of K after another."""
        if self._wide is None and self._weights.numel() * 8 <= _WIDE_BYTES:
            self._wide = self._weights.double()
        for block in (self._weights if self._wide is None else self._wide).split(tile_k, dim=2):
            yield (block if experts.numel() == len(block) else block[experts]).double().transpose(1, 2)


def blocked_product(rows: Tensor, weights: Weights, experts: Tensor, tile_k: int, splits: int) -> Tensor:
    """Return rows float32 [g, m, K] times the weights of `experts` [g, N, K] transposed, float32 [g, m, N].

    K is walked in blocks of `tile_k`, each rounded to float32 and added in order; with `splits` above one, K is first
    divided into that many runs of blocks, which are summed apart and then added in order.
    """
    exact = weights.exact_product(rows, experts)
    if exact is not None:
        return exact
    run = -(-rows.shape[2] // (tile_k * max(splits, 1)))
    total = partial = rows.new_zeros(rows.shape[0], rows.shape[1], weights.rows)
    blocks = zip(rows.double().split(tile_k, dim=2), weights.blocks(experts, tile_k), strict=True)
    for index, (left, right) in enumerate(blocks):
        if index and index % run == 0:
            total = partial if total is partial else total.add_(partial)
            partial = torch.zeros_like(total)
        partial += torch.bmm(left, right).float()
    return total if total is partial else total.add_(partial)


def _entries_of(weights: Tensor) -> _Entries | None:
    """Return what is not zero in the weights; None where that is much, or has no step in common."""
    count, height, width = weights.shape
    places = _nonzero(weights)
    if places is None or not len(places):
        return None
    rows = places.div(width, rounding_mode="floor")
    counts = torch.bincount(rows, minlength=count * height)
    values = weights.flatten().index_select(0, places).float()
    inside = places - rows * width
    columns = inside + rows.div(height, rounding_mode="floor") * width
    step = _step(values)
    if step is None:
        return None
    several = counts > 1
    sums = torch.bincount(rows, weights=values.abs().double(), minlength=len(counts)) * several
    shared = torch.bincount(inside, weights=several.index_select(0, rows).float(), minlength=width) > 0
    largest = float(sums.amax())
    most = _WHOLE * step / largest if largest else math.inf
    return _Entries(counts.view(count, height), columns, values, _starts(counts), shared.float(), most)


def _step(values: Tensor) -> float | None:
    """Return the largest power of two that float32 values are whole multiples of; zeros count as 1.

    None where it is too small, or a value is not finite.
    """
    bits = values.view(torch.int32)
    exponents, mantissas = (bits >> 23) & 0xFF, (bits & 0x7FFFFF) | 0x800000
    lowest = exponents + ((mantissas & -mantissas).float().view(torch.int32) >> 23) - 127
    step = 2.0 ** (int(torch.where(values == 0, _EXPONENT_OF_2_23, lowest).amin()) - _EXPONENT_OF_2_23)
    return None if int(exponents.amax()) == _NOT_FINITE or step < _SMALLEST else step


def _starts(counts: Tensor) -> Tensor:
    """Return where each of so many begins: int64 [c] of counts, whatever their shape."""
    flat = counts.flatten()
    return flat.cumsum(0) - flat


def _nonzero(weights: Tensor) -> Tensor | None:
    """Return the places of what is not +0.0 in the flattened weights, int64; None where they are not few.

    Words of several weights are looked through first, of which most are zero together.
    """
    flat = weights.flatten().view(_INTEGERS[weights.element_size()])
    word = next(word for word in (torch.int64, torch.int32, torch.int16) if flat.nbytes % word.itemsize == 0)
    words = flat.view(word)
    if int(words.count_nonzero()) * _SPARSE > words.numel():
        return None
    live = words.nonzero().flatten()
    found = words.index_select(0, live).view(flat.dtype).nonzero().flatten()
    each = word.itemsize // flat.itemsize
    return live.index_select(0, found.div(each, rounding_mode="floor")) * each + found % each


def _fractions(rows: Tensor, step: float) -> Tensor:
    """Return what each column [K] of rows has at most beyond whole multiples of a step, zero for none."""
    return (rows if step == 1 else rows * (1 / step)).frac().abs_().amax(0)
