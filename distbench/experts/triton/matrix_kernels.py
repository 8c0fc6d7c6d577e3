"""The two matrix products of the experts, over the places that `sort_kernels.place_routes` gave the routes.

Weights come through tensor descriptors (the copy engine of Hopper), rows through one too or gathered by pointer. A
program takes tiles `pid, pid + programs, ...` until the live ones end, so a padded buffer costs the same as a cut one.
The tiles of one expert that share weights are neighbours, so the weights are read once for all of them. With SWAP the
weights are the rows of the product and the tokens its columns: wgmma needs at least 64 rows, but only 16 columns.
"""

from __future__ import annotations

import triton
import triton.language as tl

from distbench.experts.triton.sort_kernels import live_places, wide

SCALE_BLOCK = tl.constexpr(128)


@triton.jit
def _locate(item, tiles, experts, LOCAL: tl.constexpr, COLUMN_TILES: tl.constexpr, BLOCK_M: tl.constexpr):
    """Item number → expert, tile of columns, first place, and number of the expert's places in the tile."""
    expert = tl.load(tiles + 1 + item // COLUMN_TILES)
    count = tl.load(experts + LOCAL + expert)
    within = item - tl.load(experts + 2 * LOCAL + expert) * COLUMN_TILES
    row_tiles = tl.cdiv(count, BLOCK_M)
    row_tile = within % row_tiles
    start = tl.load(experts + expert) + row_tile * BLOCK_M
    return expert, within // row_tiles, start, tl.minimum(count - row_tile * BLOCK_M, BLOCK_M)


@triton.jit
def _product(weights, rows, total, SWAP: tl.constexpr):
    if SWAP:
        total = tl.dot(weights, rows.T, total)
    else:
        total = tl.dot(rows, weights.T, total)
    return total


@triton.jit
def _scaled(weights, rows, total, row_scale, weight_scale, SWAP: tl.constexpr):
    if SWAP:
        total += tl.dot(weights, rows.T) * (row_scale * weight_scale)[None, :]
    else:
        total += tl.dot(rows, weights.T) * (row_scale * weight_scale)[:, None]
    return total


@triton.jit
def _power_of_two_scale(amax):
    """The smallest power of two by which amax fits e4m3 (at most 448) when divided; 1 where amax is 0."""
    bits = ((amax.to(tl.int32, bitcast=True) + 0x1FFFFF) & 0x7F800000) - (8 << 23)
    return tl.where(amax > 1e-30, bits, 127 << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store_activation(
    gate,
    up,
    activation,
    activation_scales,
    place,
    live,
    column,
    INTER: tl.constexpr,
    FP8: tl.constexpr,
    ROUND: tl.constexpr,
):
    """SiLU(gate) * up of a tile [places, columns], rounded; with FP8 as e4m3 with a scale per 128 columns."""
    value = (gate * tl.sigmoid(gate) * up).to(ROUND)
    place = wide(place)
    inside = live[:, None] & (column < INTER)[None, :]
    if FP8:
        exact = tl.where(inside, value.to(tl.float32), 0.0)
        scale = _power_of_two_scale(tl.max(tl.abs(exact), 1))
        value = (exact * (1.0 / scale)[:, None]).to(tl.float8e4nv)
        block = tl.min(column, 0) // SCALE_BLOCK
        tl.store(activation_scales + place * ((INTER + SCALE_BLOCK - 1) // SCALE_BLOCK) + block, scale, mask=live)
    tl.store(activation + place[:, None] * INTER + column[None, :], value, mask=inside)


@triton.jit(do_not_specialize=["routes"])
def gate_up(
    hidden,
    hidden_rows,
    scales,
    weights,
    weight_scales,
    order,
    experts,
    tiles,
    activation,
    activation_scales,
    partial,
    routes,
    TOPK: tl.constexpr,
    LOCAL: tl.constexpr,
    H: tl.constexpr,
    INTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    SPLITS: tl.constexpr,
    GATHER: tl.constexpr,
    SWAP: tl.constexpr,
    FP8: tl.constexpr,
    FLATTEN: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Stage 1: activation[place, i] = SiLU(x . gate_i) * (x . up_i), or partial[split, 2, place, i]."""
    COLUMN_TILES: tl.constexpr = (INTER + BLOCK_N - 1) // BLOCK_N
    RUN: tl.constexpr = (H + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    SCALES: tl.constexpr = (H + SCALE_BLOCK - 1) // SCALE_BLOCK
    WEIGHT_SCALES: tl.constexpr = (INTER + SCALE_BLOCK - 1) // SCALE_BLOCK * SCALES
    items = tl.load(tiles) * COLUMN_TILES * SPLITS
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN):
        split = item % SPLITS
        expert, column_tile, start, count = _locate(item // SPLITS, tiles, experts, LOCAL, COLUMN_TILES, BLOCK_M)
        offset = tl.arange(0, BLOCK_M)
        live = offset < count
        gate_row = expert * (2 * INTER) + column_tile * BLOCK_N
        place = start + tl.where(live, offset, 0)
        source = wide(place)
        if GATHER:
            source = wide(tl.load(order + place) // TOPK)
        if SWAP:
            gate = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
            up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        else:
            gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
            up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for step in range(0, RUN, BLOCK_K):
            k = split * RUN + step
            if GATHER:
                column = k + tl.arange(0, BLOCK_K)
                if H % (BLOCK_K * SPLITS) == 0:
                    rows = tl.load(hidden + source[:, None] * H + column[None, :])
                else:
                    rows = tl.load(hidden + source[:, None] * H + column[None, :], mask=column[None, :] < H, other=0.0)
            else:
                rows = hidden_rows.load([start, k])
            gate_weights = weights.load([gate_row, k])
            up_weights = weights.load([gate_row + INTER, k])
            if FP8:
                across = tl.minimum(k // SCALE_BLOCK, SCALES - 1)
                block = expert * (2 * WEIGHT_SCALES) + column_tile * BLOCK_N // SCALE_BLOCK * SCALES + across
                row_scale = tl.load(scales + source * SCALES + across)
                gate = _scaled(gate_weights, rows, gate, row_scale, tl.load(weight_scales + block), SWAP)
                up = _scaled(up_weights, rows, up, row_scale, tl.load(weight_scales + block + WEIGHT_SCALES), SWAP)
            else:
                gate = _product(gate_weights, rows, gate, SWAP)
                up = _product(up_weights, rows, up, SWAP)
        if SWAP:
            gate = gate.T
            up = up.T
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        if SPLITS == 1:
            _store_activation(gate, up, activation, activation_scales, place, live, column, INTER, FP8, ROUND)
        else:
            inside = live[:, None] & (column < INTER)[None, :]
            part = partial + wide(split * 2) * routes * INTER
            target = part + wide(place)[:, None] * INTER + column[None, :]
            tl.store(target, gate, mask=inside)
            tl.store(target + wide(routes) * INTER, up, mask=inside)


@triton.jit(do_not_specialize=["routes"])
def activate_parts(
    partial,
    experts,
    activation,
    activation_scales,
    routes,
    LOCAL: tl.constexpr,
    INTER: tl.constexpr,
    BLOCK: tl.constexpr,
    SPLITS: tl.constexpr,
    FP8: tl.constexpr,
    ROUND: tl.constexpr,
):
    """Add up the K parts of stage 1 in order, and apply the activation."""
    BLOCKS: tl.constexpr = (INTER + BLOCK - 1) // BLOCK
    places = live_places(experts, LOCAL)
    for item in range(tl.program_id(0), places * BLOCKS, tl.num_programs(0)):
        place = item // BLOCKS + tl.zeros([1], tl.int32)
        column = (item % BLOCKS) * BLOCK + tl.arange(0, BLOCK)
        source = partial + wide(place)[:, None] * INTER + column[None, :]
        inside = (column < INTER)[None, :]
        step = wide(routes) * INTER
        gate = tl.zeros([1, BLOCK], tl.float32)
        up = tl.zeros([1, BLOCK], tl.float32)
        for split in tl.static_range(SPLITS):
            gate += tl.load(source + 2 * split * step, mask=inside, other=0.0)
            up += tl.load(source + (2 * split + 1) * step, mask=inside, other=0.0)
        _store_activation(gate, up, activation, activation_scales, place, place >= 0, column, INTER, FP8, ROUND)


@triton.jit
def down(
    activation,
    activation_scales,
    weights,
    weight_scales,
    topk_weight,
    order,
    experts,
    tiles,
    output,
    TOPK: tl.constexpr,
    LOCAL: tl.constexpr,
    H: tl.constexpr,
    INTER: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ATOMIC: tl.constexpr,
    SWAP: tl.constexpr,
    FP8: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    """Stage 2: output[place, h] = weight * (activation . w2_h); with ATOMIC, added to output[row, h]."""
    COLUMN_TILES: tl.constexpr = (H + BLOCK_N - 1) // BLOCK_N
    SCALES: tl.constexpr = (INTER + SCALE_BLOCK - 1) // SCALE_BLOCK
    WEIGHT_SCALES: tl.constexpr = (H + SCALE_BLOCK - 1) // SCALE_BLOCK * SCALES
    items = tl.load(tiles) * COLUMN_TILES
    for item in tl.range(tl.program_id(0), items, tl.num_programs(0), flatten=FLATTEN):
        expert, column_tile, start, count = _locate(item, tiles, experts, LOCAL, COLUMN_TILES, BLOCK_M)
        offset = tl.arange(0, BLOCK_M)
        live = offset < count
        place = start + tl.where(live, offset, 0)
        if SWAP:
            total = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        else:
            total = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
        for k in range(0, INTER, BLOCK_K):
            rows = activation.load([start, k])
            part = weights.load([expert * H + column_tile * BLOCK_N, k])
            if FP8:
                block = expert * WEIGHT_SCALES + column_tile * BLOCK_N // SCALE_BLOCK * SCALES + k // SCALE_BLOCK
                row_scale = tl.load(activation_scales + wide(place) * SCALES + k // SCALE_BLOCK)
                total = _scaled(part, rows, total, row_scale, tl.load(weight_scales + block), SWAP)
            else:
                total = _product(part, rows, total, SWAP)
        if SWAP:
            total = total.T
        route = tl.load(order + place)
        total *= tl.load(topk_weight + route)[:, None]
        column = column_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inside = live[:, None] & (column < H)[None, :]
        value = total.to(output.dtype.element_ty)
        if ATOMIC:
            row = wide(route // TOPK)
            tl.atomic_add(output + row[:, None] * H + column[None, :], value, mask=inside, sem="relaxed")
        else:
            tl.store(output + wide(place)[:, None] * H + column[None, :], value, mask=inside)
