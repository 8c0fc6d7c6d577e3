"""Kernels around the matrix products: sort routes by expert, permute rows, and sum a token's routes.

A route is a flat index into the top-k ids, `row * k + slot`. There are at most P = M * k routes. Each kernel reads the
number of live ones on the device, and a program past them returns at once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wide(number):
    """Return a number as int64. The interpreter's loop counters are plain Python numbers, which have no `to`."""
    return number + tl.full([], 0, tl.int64)


@triton.jit
def _local_experts(ids, mask, routes, live, NUM_EXPERTS: tl.constexpr, WIDTH: tl.constexpr):
    """The local expert of each route; -1 for experts of other ranks, of no rank, and past the live routes."""
    expert = tl.arange(0, WIDTH)
    local = tl.load(mask + expert, mask=expert < NUM_EXPERTS, other=0)
    position = tl.where(local == 1, tl.cumsum(local, 0) - 1, -1)
    wanted = tl.load(ids + routes, mask=routes < live, other=-1)
    inside = (wanted >= 0) & (wanted < NUM_EXPERTS)
    return tl.where(inside, tl.gather(position, tl.where(inside, wanted, 0), 0), -1)


@triton.jit(do_not_specialize=["rows"])
def count_routes(
    ids,
    mask,
    num_local_tokens,
    counts,
    rows,
    TOPK: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """counts[block, local expert] of each live block of BLOCK routes."""
    block = tl.program_id(0)
    live = tl.minimum(tl.load(num_local_tokens), rows) * TOPK
    if block * BLOCK < live:
        routes = block * BLOCK + tl.arange(0, BLOCK)
        local = _local_experts(ids, mask, routes, live, NUM_EXPERTS, WIDTH)
        expert = tl.arange(0, LOCAL)
        found = (local[:, None] == expert[None, :]).to(tl.int32)
        tl.store(counts + block * LOCAL + expert, tl.sum(found, 0))


@triton.jit(do_not_specialize=["rows"])
def place_routes(
    ids,
    mask,
    num_local_tokens,
    counts,
    order,
    inverse,
    experts,
    tiles,
    rows,
    TOPK: tl.constexpr,
    NUM_EXPERTS: tl.constexpr,
    WIDTH: tl.constexpr,
    LOCAL: tl.constexpr,
    BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    ONE_BLOCK: tl.constexpr,
):
    """Assign a place to each local route: experts in order, and routes of one expert in order.

    order[place] is the route and inverse[route] the place, or -1. experts[3, LOCAL] holds each expert's first place,
    number of routes and first tile of BLOCK_M places; tiles[0] is the number of tiles, tiles[1 + t] the expert of tile
    t.
    """
    block = tl.program_id(0)
    live = tl.minimum(tl.load(num_local_tokens), rows) * TOPK
    if (block == 0) | (block * BLOCK < live):
        routes = block * BLOCK + tl.arange(0, BLOCK)
        local = _local_experts(ids, mask, routes, live, NUM_EXPERTS, WIDTH)
        expert = tl.arange(0, LOCAL)
        found = (local[:, None] == expert[None, :]).to(tl.int32)
        if ONE_BLOCK:
            total = tl.sum(found, 0)
            before = tl.zeros([LOCAL], tl.int32)
        else:
            total = tl.zeros([LOCAL], tl.int32)
            before = tl.zeros([LOCAL], tl.int32)
            for first in range(0, tl.cdiv(live, BLOCK), 32):
                other = first + tl.arange(0, 32)
                known = (other < tl.cdiv(live, BLOCK))[:, None]
                part = tl.load(counts + other[:, None] * LOCAL + expert[None, :], mask=known, other=0)
                total += tl.sum(part, 0)
                before += tl.sum(tl.where((other < block)[:, None], part, 0), 0)
        first_place = tl.cumsum(total, 0) - total
        places = tl.cumsum(found, 0) - found + (first_place + before)[None, :]
        place = tl.sum(tl.where(found == 1, places, 0), 1)
        tl.store(inverse + routes, tl.where(local >= 0, place, -1), mask=routes < live)
        tl.store(order + place, routes, mask=local >= 0)
        if block == 0:
            num_tiles = tl.cdiv(total, BLOCK_M)
            last_tile = tl.cumsum(num_tiles, 0)
            tl.store(experts + expert, first_place)
            tl.store(experts + LOCAL + expert, total)
            tl.store(experts + 2 * LOCAL + expert, last_tile - num_tiles)
            all_tiles = tl.sum(num_tiles, 0)
            tl.store(tiles, all_tiles)
            for start in range(0, all_tiles, 64):
                tile = start + tl.arange(0, 64)
                owner = tl.sum((last_tile[None, :] <= tile[:, None]).to(tl.int32), 1)
                tl.store(tiles + 1 + tile, owner, mask=tile < all_tiles)


@triton.jit
def live_places(experts, LOCAL: tl.constexpr):
    """Return the number of routes that have a place."""
    return tl.load(experts + LOCAL - 1) + tl.load(experts + 2 * LOCAL - 1)


@triton.jit(do_not_specialize=["pitch"])
def permute_rows(
    hidden,
    scales,
    topk_weight,
    order,
    experts,
    sorted_hidden,
    sorted_scales,
    sorted_weight,
    pitch,
    TOPK: tl.constexpr,
    LOCAL: tl.constexpr,
    H: tl.constexpr,
    BLOCK_H: tl.constexpr,
    SCALES: tl.constexpr,
    SCALE_WIDTH: tl.constexpr,
    CLUSTER: tl.constexpr,
):
    """Copy the row of each local route to its place, with its block scales if any.

    With CLUSTER as cluster_products.cu reads them: scales [blocks, pitch], and also the routing weights.
    """
    places = live_places(experts, LOCAL)
    for place in range(tl.program_id(0), places, tl.num_programs(0)):
        route = tl.load(order + place)
        row = wide(route // TOPK)
        target = wide(place)
        if CLUSTER:
            tl.store(sorted_weight + target, tl.load(topk_weight + route))
        for start in tl.static_range(0, H, BLOCK_H):
            column = start + tl.arange(0, BLOCK_H)
            values = tl.load(hidden + row * H + column, mask=column < H)
            tl.store(sorted_hidden + target * H + column, values, mask=column < H)
        if SCALES > 0:
            column = tl.arange(0, SCALE_WIDTH)
            values = tl.load(scales + row * SCALES + column, mask=column < SCALES)
            if CLUSTER:
                tl.store(sorted_scales + wide(column) * pitch + target, values, mask=column < SCALES)
            else:
                tl.store(sorted_scales + target * SCALES + column, values, mask=column < SCALES)


@triton.jit(do_not_specialize=["rows"])
def sum_routes(
    routed, inverse, num_local_tokens, output, rows, TOPK: tl.constexpr, H: tl.constexpr, BLOCK_H: tl.constexpr
):
    """output[row] = the row's routes in slot order, added in float32 and rounded once."""
    blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    live = tl.minimum(tl.load(num_local_tokens), rows)
    for item in range(tl.program_id(0), live * blocks, tl.num_programs(0)):
        row = wide(item // blocks)
        column = (item % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        total = tl.zeros([BLOCK_H], tl.float32)
        for slot in tl.static_range(TOPK):
            place = wide(tl.load(inverse + row * TOPK + slot))
            if place >= 0:
                total += tl.load(routed + place * H + column, mask=column < H, other=0.0).to(tl.float32)
        tl.store(output + row * H + column, total.to(output.dtype.element_ty), mask=column < H)


@triton.jit(do_not_specialize=["rows"])
def clear_rows(num_local_tokens, output, rows, H: tl.constexpr, BLOCK_H: tl.constexpr):
    """Zero the live rows, from which atomic adds start."""
    blocks: tl.constexpr = (H + BLOCK_H - 1) // BLOCK_H
    live = tl.minimum(tl.load(num_local_tokens), rows)
    for item in range(tl.program_id(0), live * blocks, tl.num_programs(0)):
        column = (item % blocks) * BLOCK_H + tl.arange(0, BLOCK_H)
        place = output + wide(item // blocks) * H + column
        tl.store(place, tl.zeros([BLOCK_H], output.dtype.element_ty), mask=column < H)
