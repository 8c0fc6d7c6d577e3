"""Kernels that move rows between batch, rows in transit and receive buffer; and combine's sum. Indices are int64.

Indices have no alignment of their own, so a recorded launch takes those of any order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _copy(
    source, target, row, to, SOURCE: tl.constexpr, TARGET: tl.constexpr, WIDTH: tl.constexpr, first, BLOCK: tl.constexpr
):
    column = first + tl.arange(0, BLOCK)
    inside = column < WIDTH
    tl.store(target + to * TARGET + column, tl.load(source + row * SOURCE + column, mask=inside), mask=inside)


@triton.jit(do_not_specialize=["source_rows", "target_rows", "value"])
def move(
    source0,
    target0,
    source1,
    target1,
    source2,
    target2,
    source3,
    target3,
    source_rows,
    target_rows,
    marked,
    value,
    SOURCES: tl.constexpr,
    TARGETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCKS: tl.constexpr,
    PICK: tl.constexpr,
    PUT: tl.constexpr,
    MARKS: tl.constexpr,
    STRIDE: tl.constexpr,
    FIRST: tl.constexpr,
):
    """Copy up to four fields of a row, from source_rows[i] (i, unless PICK) to target_rows[i] (i, unless PUT).

    A program copies a block of the first field; a row's first program copies the other fields too. It also marks the
    first MARKS columns of row i of `marked`, whose stride is STRIDE, of the first row only if FIRST is 1: by NaN, or by
    the integer `value`.
    """
    number = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row = tl.load(source_rows + number) if PICK else number
    to = tl.load(target_rows + number) if PUT else number
    _copy(source0, target0, row, to, SOURCES[0], TARGETS[0], WIDTHS[0], block * BLOCKS[0], BLOCKS[0])
    if block == 0:
        if WIDTHS[1]:
            _copy(source1, target1, row, to, SOURCES[1], TARGETS[1], WIDTHS[1], 0, BLOCKS[1])
        if WIDTHS[2]:
            _copy(source2, target2, row, to, SOURCES[2], TARGETS[2], WIDTHS[2], 0, BLOCKS[2])
        if WIDTHS[3]:
            _copy(source3, target3, row, to, SOURCES[3], TARGETS[3], WIDTHS[3], 0, BLOCKS[3])
        if MARKS:
            _mark(marked, number, value, MARKS, STRIDE, FIRST)


@triton.jit
def _mark(marked, number, value, MARKS: tl.constexpr, STRIDE: tl.constexpr, FIRST: tl.constexpr):
    column = tl.arange(0, MARKS)
    inside = column < tl.where(number * FIRST == 0, MARKS, 0)
    mark = tl.full([MARKS], float("nan"), tl.float32) if marked.dtype.element_ty.is_floating() else value
    tl.store(marked + number * STRIDE + column, mark, mask=inside)


@triton.jit(do_not_specialize=["slots", "there", "poison"])
def take_back(
    expert_out, slots, out, numbers, there, poison, WIDTH: tl.constexpr, BLOCK: tl.constexpr, STRIDE: tl.constexpr
):
    """Copy expert_out[slots[i]] to out[i]; NaN where the slot is not below `there`, the number of rows.

    The token number of row i, numbers[i * STRIDE], becomes `poison`.
    """
    number = tl.program_id(0).to(tl.int64)
    if tl.program_id(1) == 0:
        tl.store(numbers + number * STRIDE, poison)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    slot = tl.load(slots + number)
    readable = column < tl.where(slot < there, WIDTH, 0)
    value = tl.load(expert_out + slot * WIDTH + column, mask=readable, other=float("nan"))
    tl.store(out + number * WIDTH + column, value, mask=inside)


@triton.jit(do_not_specialize=["own_slots", "rows", "there", "leaving", "sent"])
def add_rows(
    returned,
    expert_out,
    own_slots,
    rows,
    out,
    there,
    leaving,
    sent,
    COUNT: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add the rows [token, COUNT] of each token in order, from +0.0, in float32, with one rounding.

    A row below `leaving` is in `returned`. One below `sent` is the rank's own, at expert_out[own_slots[row - leaving]],
    or NaN where that is not below `there`. `sent` means NaN, and a larger number no row.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = column < WIDTH
    total = tl.zeros([BLOCK], tl.float32)
    for index in tl.static_range(COUNT):
        row = tl.load(rows + token * COUNT + index)
        if row < leaving:
            total += tl.load(returned + row * WIDTH + column, mask=inside, other=0.0).to(tl.float32)
        elif row <= sent:
            slot = there + 0 * row
            if row < sent:
                slot = tl.load(own_slots + row - leaving)
            readable = column < tl.where(slot < there, WIDTH, 0)
            total += tl.load(expert_out + slot * WIDTH + column, mask=readable, other=float("nan")).to(tl.float32)
    tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)
