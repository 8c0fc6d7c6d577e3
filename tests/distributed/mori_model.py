"""MoRI's documented semantics, one token and one addition at a time; shares no code with the stand-in.

Written from the description of dispatch and combine in docs/mori.md. Rows are lists of Python floats; every float32
step goes through `f32`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LARGEST = {torch.float8_e4m3fn: 448.0, torch.float8_e4m3fnuz: 240.0}
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
BLOCKS = 56


class Layout(NamedTuple):
    """A kernel type on W ranks of El experts each, P ranks to a node, and the e4m3 of its devices."""

    kernel: str
    ranks: int
    experts: int
    per_node: int
    fp8: torch.dtype = torch.float8_e4m3fn


def f32(value: float) -> float:
    """Round to float32, as one operation of a kernel does."""
    try:
        rounded: float = struct.unpack("<f", struct.pack("<f", value))[0]
    except OverflowError:
        return math.copysign(math.inf, value)
    return rounded


def bf16(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float32).bfloat16())


def e4m3(value: float, fp8: torch.dtype) -> float:
    return float(torch.tensor(min(max(value, -LARGEST[fp8]), LARGEST[fp8])).to(fp8))


def e2m1(value: float) -> float:
    """Round to the nearest 4-bit float, ties to the even code."""
    distances = [abs(abs(value) - size) for size in E2M1]
    code = min(range(len(E2M1)), key=lambda code: (distances[code], code % 2))
    return math.copysign(E2M1[code], value)


def owners(layout: Layout, ids: list[int]) -> list[int | None]:
    """Rank of each slot; None if the kernel skips the slot."""
    return [None if e < 0 or e >= layout.ranks * layout.experts else e // layout.experts for e in ids]


def representatives(layout: Layout, ids: list[int]) -> list[tuple[int, int]]:
    """(slot, rank) of the slots that represent a rank, in slot order: the first of each rank, or the last in LL."""
    seen: dict[int, int] = {}
    for slot, owner in enumerate(owners(layout, ids)):
        if owner is None or (layout.kernel == "IntraNodeLL" and slot >= 8):
            continue
        if layout.kernel == "IntraNodeLL" or owner not in seen:
            seen[owner] = slot
    return sorted((slot, rank) for rank, slot in seen.items())


def received(layout: Layout, ids: list[list[list[int]]], rank: int) -> list[tuple[int, int]]:
    """(source rank, source token) of every row that `rank` receives, sorted; `ids` by rank and token."""
    return [
        (source, token)
        for source, tokens in enumerate(ids)
        for token, row in enumerate(tokens)
        if rank in [owner for _, owner in representatives(layout, row)]
    ]


def combined(layout: Layout, ids: list[int], rows: Callable[[int], list[float]], quant: str) -> list[float]:
    """Result of one token, bf16 values, from its expert rows on each rank."""
    order = [rank for _, rank in representatives(layout, ids)]
    sent = {rank: _transported(rows(rank), quant, layout.fp8) for rank in order}
    columns = len(next(iter(sent.values()))) if sent else 0
    return [bf16(_sum(layout, order, [sent[rank][c] for rank in order], quant)) for c in range(columns)]


class _Element(NamedTuple):
    value: float
    scale: float | None


def _transported(row: list[float], quant: str, fp8: torch.dtype) -> list[_Element]:
    if quant == "none":
        return [_Element(value, None) for value in row]
    if quant == "fp8_direct_cast":
        return [_Element(e4m3(value, fp8), None) for value in row]
    size, most = -(-len(row) // BLOCKS), LARGEST[fp8]
    found: list[_Element] = []
    any_scaled = False
    for start in range(0, len(row), size):
        block = row[start : start + size]
        amax = max(abs(value) for value in block)
        if quant == "fp4_blockwise":
            any_scaled = True
            scale, factor = (f32(amax / E2M1[-1]), f32(E2M1[-1] / amax)) if amax else (1.0, 0.0)
            found += [_Element(e2m1(f32(value * factor)), scale) for value in block]
        elif amax > most:
            any_scaled = True
            scale, factor = f32(amax * f32(1.0 / most)), f32(most / amax)
            found += [_Element(e4m3(f32(value * factor), fp8), scale) for value in block]
        else:
            found += [_Element(e4m3(value, fp8), 1.0) for value in block]
    return found if any_scaled else [_Element(element.value, None) for element in found]


def _add(total: float, element: _Element) -> float:
    if element.scale is None:
        return f32(total + element.value)
    return f32(total + element.value * element.scale)  # fused: Python's float holds the product of fp8 and float32


def _sum(layout: Layout, order: list[int], elements: list[_Element], quant: str) -> float:
    if layout.kernel not in ("InterNodeV1", "InterNodeV1LL"):
        total = 0.0
        for element in elements:
            total = _add(total, element)
        return total
    total = 0.0
    for node in range(layout.ranks // layout.per_node):
        here = [element for rank, element in zip(order, elements, strict=True) if rank // layout.per_node == node]
        if here:
            partial = 0.0
            for element in here:
                partial = _add(partial, element)
            total = f32(total + (e4m3(partial, layout.fp8) if quant == "fp8_direct_cast" else bf16(partial)))
    return total


def rows_of(values: list[list[float]]) -> Tensor:
    """Tensor of `rows`, bf16 [n, H]; every value is representable in bf16."""
    return torch.tensor(values, dtype=torch.float64).bfloat16()
