"""Rows times weights, with the bits of a kernel that walks K in blocks, and a shortcut where no sum rounds.

Few entries of a row of exact weights are non-zero (`distbench.workload.exact`). A row with one entry has the product
itself, rounded once, whatever the numbers. A row with several reads integer multiples of a step, whose sums float32
holds exactly up to a bound. So zeros need not be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_WIDE_BYTES = 8 << 20
# Weights are sparse where at most one in this number of their 64-bit words is non-zero.
_SPARSE = 4
# The mode of embedding_bag that sums.
_SUM = 0
_INTEGERS = {2: torch.int16, 4: torch.int32}
# float32 holds integer multiples of a step exactly up to this number.
_WHOLE = 2.0**24
# Steps to search in rows, and the smallest one in weights.
_STEPS = (1.0, 0.25, 2.0**-7)
_SMALLEST = 2.0**-40
# float32 exponents: of 2**23, whose mantissa unit is 1, and of infinities and NaN.
_EXPONENT_OF_2_23, _NOT_FINITE = 150, 255


class _Entries(NamedTuple):
    """Non-zero entries of weights [El, N, K] in order of expert and row; `counts` int64 [El, N] per row.

    columns int64 [e] are offset by K from expert to expert; values float32 [e]; `starts` int64 [El * N] are the first
    entries of rows. `shared` bool [K] marks the columns read by any row with several entries. Inputs there give exact
    sums if they are integer multiples of a step, at most `most` of it.
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
        """Return the entries of `experts` [g] alone, with columns offset in that order; `width` is K."""
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
    """One stage's weights [El, N, K], bf16 or float32, prepared for `blocked_product`."""

    def __init__(self, weights: Tensor) -> None:
        """Scan `weights`, which must not be written to from here on."""
        self.rows = weights.shape[1]
        self._weights = weights
        self._wide: Tensor | None = None
        self._entries = _entries_of(weights)

    def exact_product(self, rows: Tensor, experts: Tensor) -> Tensor | None:
        """Return rows float32 [g, m, K] times the weights of `experts` [g], float32 [g, m, N]; None if a sum rounds."""
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
        """Yield float64 [g, at most tile_k, N] of `experts`, one K block after another."""
        if self._wide is None and self._weights.numel() * 8 <= _WIDE_BYTES:
            self._wide = self._weights.double()
        for block in (self._weights if self._wide is None else self._wide).split(tile_k, dim=2):
            yield (block if experts.numel() == len(block) else block[experts]).double().transpose(1, 2)


def blocked_product(rows: Tensor, weights: Weights, experts: Tensor, tile_k: int, splits: int) -> Tensor:
    """Return rows float32 [g, m, K] times the weights of `experts` [g, N, K] transposed, float32 [g, m, N].

    K is walked in blocks of `tile_k`, each rounded to float32 and added in order. With `splits` above one, K is first
    divided into that many runs of blocks, which are summed separately and then added in order.
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
    """Return the non-zero entries of the weights; None if there are many, or if they have no common step."""
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
    """Return the largest power of two of which all float32 values are integer multiples; zeros count as 1.

    None if it is too small, or a value is not finite.
    """
    bits = values.view(torch.int32)
    exponents, mantissas = (bits >> 23) & 0xFF, (bits & 0x7FFFFF) | 0x800000
    lowest = exponents + ((mantissas & -mantissas).float().view(torch.int32) >> 23) - 127
    step = 2.0 ** (int(torch.where(values == 0, _EXPONENT_OF_2_23, lowest).amin()) - _EXPONENT_OF_2_23)
    return None if int(exponents.amax()) == _NOT_FINITE or step < _SMALLEST else step


def _starts(counts: Tensor) -> Tensor:
    """Exclusive prefix sum of counts, flattened: int64 [c]."""
    flat = counts.flatten()
    return flat.cumsum(0) - flat


def _nonzero(weights: Tensor) -> Tensor | None:
    """Return the indices of entries other than +0.0 in the flattened weights, int64; None unless they are few.

    Whole words of several weights are scanned first; most of them are zero.
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
    """Return the largest remainder of each column [K] of rows modulo a step, zero for none."""
    return (rows if step == 1 else rows * (1 / step)).frac().abs_().amax(0)
