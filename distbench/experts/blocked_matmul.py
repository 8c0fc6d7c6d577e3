"""Rows times weights, with the bits of a kernel that walks K in blocks, and a shortcut where no sum rounds.

Few entries of a row of exact weights are non-zero (`distbench.workload.exact`). A row with one entry has the product
itself, rounded once, whatever the numbers. A row with several reads integer multiples of a step, whose sums float32
holds exactly up to a bound. So zeros need not be read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

_WIDE_BYTES = 8 << 20
# Weights are sparse where at most one in this number of their 64-bit words is non-zero.
_SPARSE = 4
# Words that tell dense weights from sparse ones before all are scanned.
_SAMPLE = 128
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
        read = rows * self.shared  # NaN where a column that is not read holds an infinity
        if not read.numel():
            return False
        most = float(read.abs().amax())
        return any(most <= self.most * step and not _have_fractions(read, step) for step in _STEPS)

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
        wide = self._by_block(tile_k)
        for block in self._weights.split(tile_k, dim=2) if wide is None else wide.unbind(1):
            yield (block if experts.numel() == len(block) else block.index_select(0, experts)).double().transpose(1, 2)

    def block_products(self, rows: Tensor, experts: Tensor, tile_k: int) -> Iterable[Tensor]:
        """Return the products of rows float32 [g, m, K] with `experts`, float32 [g, m, N], one K block after another.

        They may be written to. One call multiplies all blocks of weights that are kept in float64.
        """
        wide = self._by_block(tile_k)
        if wide is None:
            pairs = zip(rows.double().split(tile_k, dim=2), self.blocks(experts, tile_k), strict=True)
            return (torch.bmm(left, right).float() for left, right in pairs)
        used = wide if experts.numel() == wide.shape[0] else wide.index_select(0, experts)
        count, blocks, _, inside = used.shape
        left = rows.unflatten(2, (blocks, inside)).transpose(1, 2)
        left = left.to(torch.float64, memory_format=torch.contiguous_format).flatten(0, 1)
        found = torch.bmm(left, used.flatten(0, 1).transpose(1, 2)).float()
        products: tuple[Tensor, ...] = found.unflatten(0, (count, blocks)).unbind(1)
        return products

    def _by_block(self, tile_k: int) -> Tensor | None:
        """Return the weights in float64 by K block, [El, K / tile_k, N, tile_k]; None where they are many or odd."""
        width = self._weights.shape[2]
        inside = min(tile_k, width)
        if self._weights.numel() * 8 > _WIDE_BYTES or width % inside:
            return None
        if self._wide is None or self._wide.shape[3] != inside:
            blocks = self._weights.unflatten(2, (width // inside, inside)).transpose(1, 2)
            self._wide = blocks.to(torch.float64, memory_format=torch.contiguous_format)
        return self._wide


def blocked_product(rows: Tensor, weights: Weights, experts: Tensor, tile_k: int, splits: int) -> Tensor:
    """Return rows float32 [g, m, K] times the weights of `experts` [g, N, K] transposed, float32 [g, m, N].

    K is walked in blocks of `tile_k`, each rounded to float32 and added in order. With `splits` above one, K is first
    divided into that many runs of blocks, which are summed separately and then added in order.
    """
    exact = weights.exact_product(rows, experts)
    if exact is not None:
        return exact
    run = -(-rows.shape[2] // (tile_k * max(splits, 1)))
    total: Tensor | None = None
    partial: Tensor | None = None
    for index, product in enumerate(weights.block_products(rows, experts, tile_k)):
        if partial is None:
            partial = product.add_(0.0)  # a sum from +0.0 has no -0.0
        elif index % run:
            partial.add_(product)
        else:
            total, partial = partial if total is None else total.add_(partial), product.add_(0.0)
    assert partial is not None  # noqa: S101 - weights have columns
    return partial if total is None else total.add_(partial)


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
    some = words[:: words.numel() // _SAMPLE | 1]  # an odd step: even ones would read one column of most shapes
    if int(some.count_nonzero()) * 2 > some.numel():
        return None
    live = words.nonzero().flatten()
    if live.numel() * _SPARSE > words.numel():
        return None
    found = words.index_select(0, live).view(flat.dtype).nonzero().flatten()
    each = word.itemsize // flat.itemsize
    return live.index_select(0, found >> each.bit_length() - 1) * each + (found & each - 1)


def _have_fractions(rows: Tensor, step: float) -> bool:
    """Whether any value of the rows, all finite, is no integer multiple of a step."""
    return float((rows if step == 1 else rows * (1 / step)).frac().abs_().amax()) > 0
