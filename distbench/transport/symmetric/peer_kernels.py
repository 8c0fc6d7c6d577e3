"""The two kernels over symmetric memory: dispatch writes rows into peers, combine reads the experts' rows from them.

Memory order is argued in docs/symmetric.md. Rows, slots and offsets are int64 where they are multiplied.
"""

from __future__ import annotations

import triton
import triton.language as tl

# Control words of a rank, int32. Peers add to COUNT and to the arrivals; the others are the rank's own.
COUNT = tl.constexpr(0)  # slots taken in the receive buffer
TOTAL = tl.constexpr(1)  # rows received, at most the capacity
LOST_ROWS = tl.constexpr(2)  # rows that found no slot
CALLS = tl.constexpr(3)  # dispatches ended
DONE = tl.constexpr(4)  # programs of the running kernel that have written their rows
GO = tl.constexpr(5)  # calls in which all ranks have laid out their expert rows
STUCK = tl.constexpr(6)  # 0, or one more than a rank that did not arrive; negative in combine
ARRIVALS = tl.constexpr(32)  # of each rank, in dispatch and then in combine

# Where a token's row for a rank went, if not to a slot: nowhere, or to a rank whose buffer was full.
NOWHERE = tl.constexpr(-1)
LOST = tl.constexpr(-2)

DISPATCH = tl.constexpr(0)
COMBINE = tl.constexpr(1)


@triton.jit
def _ticks(polls, CLOCK: tl.constexpr):
    """Time in milliseconds where the device has a clock, else the number of polls."""
    if CLOCK:
        now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
        return now // 1_000_000
    return polls


@triton.jit
def _pause(CLOCK: tl.constexpr):
    """Let a spinning program leave the memory to others for about 100 ns."""
    if CLOCK:
        tl.inline_asm_elementwise("nanosleep.u32 100; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _signal(
    peers, PHASE: tl.constexpr, RANK: tl.constexpr, RANKS: tl.constexpr, LANES: tl.constexpr, SEM: tl.constexpr
):
    """Add 1 to this rank's arrival word on every rank; what this program has seen written is written for them."""
    lanes = tl.arange(0, LANES)
    inside = lanes < RANKS
    control = tl.load(peers + lanes, mask=inside, other=0).to(tl.pointer_type(tl.int32))
    word = control + ARRIVALS + PHASE * RANKS + RANK
    tl.atomic_add(word, tl.full([LANES], 1, tl.int32), mask=inside, sem=SEM, scope="sys")


@triton.jit
def _await(
    control,
    epoch,
    limit,
    PHASE: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    SEM: tl.constexpr,
    CLOCK: tl.constexpr,
):
    """Wait until all ranks have arrived `epoch` times; give up after `limit` ticks and note a missing rank."""
    lanes = tl.arange(0, LANES)
    inside = lanes < RANKS
    words = control + ARRIVALS + PHASE * RANKS + lanes
    polls = tl.full([], 0, tl.int64)
    begun = _ticks(polls, CLOCK)
    missing = tl.full([], 1, tl.int32)
    while missing > 0:
        arrived = tl.atomic_add(words, tl.zeros([LANES], tl.int32), mask=inside, sem=SEM, scope="sys")
        late = inside & (arrived - epoch < 0)
        missing = tl.sum(late.to(tl.int32), 0)
        polls += 1
        if missing > 0:
            if _ticks(polls, CLOCK) - begun > limit:
                first = tl.min(tl.where(late, lanes, LANES), 0) + 1
                tl.store(control + STUCK, tl.where(PHASE == 0, first, -first))
                missing = missing * 0
            else:
                _pause(CLOCK)


@triton.jit
def _put(source, row, base, OFFSET: tl.constexpr, slot, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Copy a short row of a field to its slot on a rank."""
    column = tl.arange(0, BLOCK)
    inside = column < WIDTH
    target = (base + OFFSET).to(source.dtype) + slot.to(tl.int64) * WIDTH
    tl.store(target + column, tl.load(source + row * WIDTH + column, mask=inside), mask=inside)


@triton.jit
def _put_rows(
    hidden,
    token,
    place,
    peers,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    FLAW: tl.constexpr,
):
    """Read a token's payload once, and write it to its slots."""
    lanes = tl.arange(0, LANES)
    for first in tl.static_range(0, WIDTH, BLOCK):
        column = first + tl.arange(0, BLOCK)
        row = tl.load(hidden + token * WIDTH + column, mask=column < WIDTH)
        if FLAW == "reuse":
            row = row ^ row
        for rank in tl.static_range(RANKS):
            to = tl.sum(tl.where(lanes == rank, place, 0), 0).to(tl.int64)
            there = tl.load(peers + rank) + OFFSET
            target = tl.multiple_of(there.to(hidden.dtype), 16) + to * WIDTH + column
            width = tl.where(to >= 0, WIDTH, 0)
            if FLAW == "stale slot":
                width = tl.where(token % 4 > 0, width, 0)
            if FLAW == "no payload":
                width = width * 0
            tl.store(target, row, mask=column < width)


@triton.jit
def _put_details(
    scales,
    weights,
    ids,
    token,
    place,
    peers,
    source,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCKS: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
):
    """Copy a token's scales, weights and ids, and its `source`, to its slots."""
    lanes = tl.arange(0, LANES)
    for rank in tl.static_range(RANKS):
        to = tl.sum(tl.where(lanes == rank, place, 0), 0)
        if to >= 0:
            there = tl.load(peers + rank)
            if WIDTHS[1]:
                _put(scales, token, there, OFFSETS[1], to, WIDTHS[1], BLOCKS[1])
            _put(weights, token, there, OFFSETS[2], to, WIDTHS[2], BLOCKS[2])
            _put(ids, token, there, OFFSETS[3], to, WIDTHS[3], BLOCKS[3])
            tl.store((there + OFFSETS[4]).to(tl.pointer_type(tl.int32)) + to, source)


@triton.jit(do_not_specialize=["tokens", "limit"])
def dispatch(
    hidden,
    scales,
    weights,
    ids,
    places,
    control,
    peers,
    limit,
    tokens,
    OFFSETS: tl.constexpr,
    WIDTHS: tl.constexpr,
    BLOCKS: tl.constexpr,
    CAPACITY: tl.constexpr,
    STRIDE: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    CLOCK: tl.constexpr,
    FLAW: tl.constexpr,
):
    """Write each token's row once into every rank that holds one of its experts, signal, and wait for all ranks.

    `places` int32 [tokens, RANKS] takes the slot of each row. OFFSETS, WIDTHS and BLOCKS are those of hidden, scales,
    weights and ids; OFFSETS also has that of the sources, rank * STRIDE + token. EXPERTS are those of one rank. FLAW
    names a fault to imitate, "" for none (faults/symmetric.py); "payload" and "reuse" write payload alone.
    """
    RELEASE: tl.constexpr = "relaxed" if FLAW == "fence" else "release"
    ACQUIRE: tl.constexpr = "relaxed" if FLAW == "fence" else "acquire"
    ALONE: tl.constexpr = FLAW == "reuse" or FLAW == "payload"  # noqa: PLR1714 - Triton compiles no `in`
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    lanes = tl.arange(0, LANES)
    slots_k = tl.arange(0, BLOCKS[3])
    base = tl.load(peers + lanes, mask=lanes < RANKS, other=0)
    counters = base.to(tl.pointer_type(tl.int32)) + COUNT
    for number in range(program, tokens, programs):
        token = number + tl.full([], 0, tl.int64)
        if ALONE:
            place = tl.load(places + token * RANKS + lanes, mask=lanes < RANKS, other=NOWHERE)
            if FLAW == "reuse":
                place = tl.where(place >= 0, number, place)
        else:
            chosen = tl.load(ids + token * WIDTHS[3] + slots_k, mask=slots_k < WIDTHS[3], other=-1)
            owner = tl.where((chosen >= 0) & (chosen < EXPERTS * RANKS), chosen // EXPERTS, LANES)
            goes = tl.max((owner[:, None] == lanes[None, :]).to(tl.int32), 0) > 0
            slot = tl.atomic_add(counters, tl.full([LANES], 1, tl.int32), mask=goes, sem="relaxed", scope="sys")
            place = tl.where(goes, tl.where(slot < CAPACITY, slot, LOST), NOWHERE)
            tl.store(places + token * RANKS + lanes, place, mask=lanes < RANKS)
        _put_rows(hidden, token, place, peers, OFFSETS[0], WIDTHS[0], BLOCKS[0], RANKS, LANES, FLAW)
        if not ALONE:
            _put_details(
                scales, weights, ids, token, place, peers, RANK * STRIDE + number, OFFSETS, WIDTHS, BLOCKS, RANKS, LANES
            )
    if not ALONE:
        tl.debug_barrier()
        done = tl.atomic_add(control + DONE, 1, sem="relaxed" if FLAW == "fence" else "acq_rel", scope="gpu")
        if done == programs - 1:
            epoch = tl.load(control + CALLS) + 1
            tl.debug_barrier()
            if FLAW != "no signal":
                _signal(peers, DISPATCH, RANK, RANKS, LANES, RELEASE)
            if FLAW != "no wait":
                _await(control, epoch, limit, DISPATCH, RANKS, LANES, ACQUIRE, CLOCK)
            tl.debug_barrier()
            taken = tl.atomic_add(control + COUNT, 0, sem="relaxed", scope="sys")
            tl.store(control + TOTAL, tl.minimum(taken, CAPACITY))
            tl.store(control + LOST_ROWS, tl.maximum(taken - CAPACITY, 0))
            tl.store(control + CALLS, epoch)
            tl.store(control + DONE, 0)


@triton.jit(do_not_specialize=["held", "tokens", "limit"])
def combine(
    expert_out,
    ids,
    places,
    out,
    control,
    peers,
    limit,
    held,
    tokens,
    OFFSET: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    TOPK: tl.constexpr,
    EXPERTS: tl.constexpr,
    RANK: tl.constexpr,
    RANKS: tl.constexpr,
    LANES: tl.constexpr,
    CLOCK: tl.constexpr,
    FLAW: tl.constexpr,
):
    """Lay out this rank's `held` expert rows, wait for all ranks, and add the rows of its tokens from their ranks.

    Rows past `held` are NaN, as is a row that `ids` [tokens, TOPK] want and dispatch sent nowhere. Rows are added in
    float32 from +0.0, in the order of the top-k slots, with one rounding. All programs have to run at once.
    """
    RELEASE: tl.constexpr = "relaxed" if FLAW == "fence" else "release"
    ACQUIRE: tl.constexpr = "relaxed" if FLAW == "fence" else "acquire"
    CHUNKS: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    programs = tl.num_programs(0)
    epoch = tl.load(control + CALLS)
    received = tl.load(control + TOTAL)
    mine = tl.multiple_of((tl.load(peers + RANK) + OFFSET).to(expert_out.dtype), 16)
    for item in range(program, received * CHUNKS, programs):
        row = item // CHUNKS + tl.full([], 0, tl.int64)
        column = item % CHUNKS * BLOCK + tl.arange(0, BLOCK)
        inside = column < WIDTH
        readable = column < tl.where(row < held, WIDTH, 0)
        value = tl.load(expert_out + row * WIDTH + column, mask=readable, other=float("nan"))
        tl.store(mine + row * WIDTH + column, value, mask=inside)
    tl.debug_barrier()
    done = tl.atomic_add(control + DONE, 1, sem="relaxed" if FLAW == "fence" else "acq_rel", scope="gpu")
    if done == programs - 1:
        tl.store(control + COUNT, 0)
        tl.store(control + DONE, 0)
        tl.debug_barrier()
        if FLAW != "no signal":
            _signal(peers, COMBINE, RANK, RANKS, LANES, RELEASE)
        if FLAW != "no wait":
            _await(control, epoch, limit, COMBINE, RANKS, LANES, ACQUIRE, CLOCK)
        tl.debug_barrier()
        tl.atomic_xchg(control + GO, epoch, sem=RELEASE, scope="gpu")
    else:
        ready = tl.atomic_add(control + GO, 0, sem=ACQUIRE, scope="gpu")
        while ready - epoch < 0:
            _pause(CLOCK)
            ready = tl.atomic_add(control + GO, 0, sem=ACQUIRE, scope="gpu")
    tl.debug_barrier()
    for item in range(program, tokens * CHUNKS, programs):
        token = item // CHUNKS + tl.full([], 0, tl.int64)
        column = item % CHUNKS * BLOCK + tl.arange(0, BLOCK)
        inside = column < WIDTH
        total = tl.zeros([BLOCK], tl.float32)
        added = tl.full([], 0, tl.int32)
        for index in tl.static_range(TOPK):
            chosen = tl.load(ids + token * TOPK + index)
            valid = (chosen >= 0) & (chosen < EXPERTS * RANKS)
            owner = tl.where(valid, chosen // EXPERTS, 0)
            counts = valid & (((added >> owner) & 1) == 0)
            added = tl.where(counts, added | (1 << owner), added)
            slot = tl.load(places + token * RANKS + owner).to(tl.int64)
            there = tl.multiple_of((tl.load(peers + owner) + OFFSET).to(expert_out.dtype), 16)
            readable = column < tl.where(counts & (slot >= 0), WIDTH, 0)
            row = tl.load(there + slot * WIDTH + column, mask=readable, other=0.0).to(tl.float32)
            total += tl.where(counts & (slot < 0), float("nan"), row)
        tl.store(out + token * WIDTH + column, total.to(out.dtype.element_ty), mask=inside)
