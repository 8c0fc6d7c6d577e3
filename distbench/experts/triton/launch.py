"""The launches of one call: sort, stage 1, stage 2, sum. Nothing is read back, so CUDA graphs can hold them."""

from __future__ import annotations

from functools import lru_cache, reduce
from operator import or_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: TID253 - loaded only where the kernels run

from distbench.experts.base import ExpertInput
from distbench.experts.shapes import check_triton_shape
from distbench.experts.triton import cluster_products, matrix_kernels, sort_kernels
from distbench.experts.triton.config import KernelConfig, Tile
from distbench.utils.recorded_call import RecordedCall, scratch
from distbench.utils.triton_launch import launch
from distbench.workload.exact_plan import BLOCK

_SORT_ELEMENTS = 16384
_COPY_COLUMNS = 1024
# Elements of int32 for which a kernel may assume alignment.
_ALIGNED = 4
# Bytes for which a recorded kernel may assume alignment.
_ADDRESS = 16
# Beyond this much scratch, calls take the device longer than Python needs to prepare them.
_RECORDED_BYTES = 256 << 20
_RECORDED_CALLS = 1024


class Weights(NamedTuple):
    """w1 [El, 2I, H] and w2 [El, H, I], for float8 with scales per 128 x 128 block, and the local-expert mask [E]."""

    w1: Tensor
    w2: Tensor
    scales1: Tensor | None
    scales2: Tensor | None
    mask: Tensor


class Sorted(NamedTuple):
    """Places of the routes, as `sort_kernels.place_routes` writes them, and the width of its tables."""

    order: Tensor
    inverse: Tensor
    experts: Tensor
    tiles: Tensor
    local: int


class _Known(NamedTuple):
    """A recorded call; as long as it is held, `id(config)` is no other one's."""

    config: KernelConfig
    call: RecordedCall


_CALLS: dict[tuple[object, ...], _Known] = {}


def compute(rows: ExpertInput, weights: Weights, config: KernelConfig, dtype: torch.dtype) -> Tensor:
    """Return the weighted sum of each row's local experts, [M, H] of `dtype`; undefined past num_local_tokens.

    Raises:
        Unsupported: the kernels cannot compute this layer, or not on this device.
    """
    hidden, w1 = rows.hidden, weights.w1
    shape = hidden.shape
    output = hidden.new_empty(shape, dtype=dtype)
    if shape[0] == 0:
        return output
    given = *rows, *weights, output
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in given]
    key = id(config), dtype, hidden.dtype, hidden.device, shape, rows.ids.shape, w1.shape, weights.mask.shape
    known = _CALLS.get(key)
    if known is not None and not reduce(or_, addresses) % _ADDRESS:
        known.call.repeat(addresses, hidden.device)
        return output
    check_triton_shape(w1.shape[2], weights.w2.shape[2], w1.element_size())
    if config.kernel == "cuda":
        cluster_products.check(w1.shape[2], weights.w2.shape[2], w1.device)
    call = RecordedCall(given)
    with call.record():
        _compute(rows, weights, config, output, _processors(hidden.device))
    if config.kernel == "triton" and call.scratch_bytes <= _RECORDED_BYTES and hidden.is_cuda:
        if len(_CALLS) == _RECORDED_CALLS:
            _CALLS.clear()
        _CALLS[key] = _Known(config, call)
    return output


@lru_cache
def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def _compute(rows: ExpertInput, weights: Weights, config: KernelConfig, output: Tensor, processors: int) -> None:
    count, hidden_size = output.shape
    topk = rows.ids.shape[1]
    placed = sort(rows, weights, config.block_m)
    atomic = config.mode == "atomic"
    across = min(hidden_size, 4 * _COPY_COLUMNS)
    constants = {"H": hidden_size, "BLOCK_H": _power_of_two(across)}
    programs = (8 * processors,)
    if atomic:
        launch(sort_kernels.clear_rows, programs, rows.num_local_tokens, output, count, **constants)
        target = output
    else:
        target = scratch(output, count * topk, hidden_size)
    if config.kernel == "cuda":
        cluster_stages(rows, weights, placed, config, processors, target)
    else:
        activation, scales = stage1(rows, weights, placed, config, processors, output.dtype)
        stage2(rows, weights, placed, config, processors, (activation, scales, target))
    if not atomic:
        summed = target, placed.inverse, rows.num_local_tokens, output, count
        launch(sort_kernels.sum_routes, programs, *summed, TOPK=topk, **constants)


def sort(rows: ExpertInput, weights: Weights, block_m: int) -> Sorted:
    """Assign a place to each live route of a local expert."""
    count, topk = rows.ids.shape
    num_experts, num_local = weights.mask.numel(), weights.w1.shape[0]
    local = max(_power_of_two(num_local), 16)
    block = max(_SORT_ELEMENTS // local, 64)
    blocks = -(-count * topk // block)
    sizes = (count * topk, count * topk, 3 * local, 1 + count * topk // block_m + num_local, blocks * local)
    room = [-(-size // _ALIGNED) * _ALIGNED for size in sizes]
    order, inverse, experts, tiles, counts = scratch(rows.ids, sum(room)).split(room)
    placed = Sorted(order[: count * topk], inverse, experts, tiles, local)
    shape = {
        "TOPK": topk,
        "NUM_EXPERTS": num_experts,
        "WIDTH": max(_power_of_two(num_experts), 16),
        "LOCAL": local,
        "BLOCK": block,
        "num_warps": 8,
    }
    given = rows.ids, weights.mask, rows.num_local_tokens, counts
    if blocks > 1:
        launch(sort_kernels.count_routes, (blocks,), *given, count, **shape)
    tiling = {"BLOCK_M": block_m, "ONE_BLOCK": blocks == 1}
    tables = placed.order, placed.inverse, placed.experts, placed.tiles
    launch(sort_kernels.place_routes, (blocks,), *given, *tables, count, **tiling, **shape)
    return placed


def stage1(  # noqa: PLR0913 - the parts of a launch
    rows: ExpertInput, weights: Weights, placed: Sorted, config: KernelConfig, processors: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor | None]:
    """Return SiLU(gate) * up of each place, [P, I] in the rows' dtype, with scales [P, I/128] for float8."""
    tile, (num_local, double, hidden_size) = config.stage1, weights.w1.shape
    inter = double // 2
    routes, topk = placed.order.numel(), rows.ids.shape[1]
    fp8 = rows.scales is not None
    hidden, scales = rows.hidden, rows.scales
    if not config.gather:
        hidden, scales, _ = sorted_copy(rows, placed, processors)
    activation = scratch(hidden, routes, inter)
    activation_scales = None if scales is None else scratch(scales, routes, -(-inter // BLOCK))
    partial = None
    if config.splits > 1:
        partial = scratch(hidden, config.splits * 2 * routes * inter, dtype=torch.float32)
    launch(
        matrix_kernels.gate_up,
        _programs(tile, processors),
        hidden,
        None if config.gather else _descriptor(hidden, config.block_m, tile.k),
        scales,
        _descriptor(weights.w1.view(num_local * double, hidden_size), tile.n, tile.k),
        weights.scales1,
        placed.order,
        placed.experts,
        placed.tiles,
        activation,
        activation_scales,
        partial,
        routes,
        TOPK=topk,
        LOCAL=placed.local,
        H=hidden_size,
        INTER=inter,
        SPLITS=config.splits,
        GATHER=config.gather,
        ROUND=_triton_type(dtype),
        **_constants(tile, config.block_m, fp8=fp8),
    )
    if partial is not None:
        launch(
            matrix_kernels.activate_parts,
            (8 * processors,),
            partial,
            placed.experts,
            activation,
            activation_scales,
            routes,
            LOCAL=placed.local,
            INTER=inter,
            BLOCK=BLOCK if fp8 else min(_power_of_two(inter), _COPY_COLUMNS),
            SPLITS=config.splits,
            FP8=fp8,
            ROUND=_triton_type(dtype),
        )
    return activation, activation_scales


def stage2(  # noqa: PLR0913 - the parts of a launch
    rows: ExpertInput,
    weights: Weights,
    placed: Sorted,
    config: KernelConfig,
    processors: int,
    tensors: tuple[Tensor, Tensor | None, Tensor],
) -> None:
    """Write the weighted result of each place to the third tensor [P, H], or add it to its row of [M, H]."""
    tile, (num_local, hidden_size, inter) = config.stage2, weights.w2.shape
    activation, scales, target = tensors
    launch(
        matrix_kernels.down,
        _programs(tile, processors),
        _descriptor(activation, config.block_m, tile.k),
        scales,
        _descriptor(weights.w2.view(num_local * hidden_size, inter), tile.n, tile.k),
        weights.scales2,
        rows.weights,
        placed.order,
        placed.experts,
        placed.tiles,
        target,
        TOPK=rows.ids.shape[1],
        LOCAL=placed.local,
        H=hidden_size,
        INTER=inter,
        ATOMIC=config.mode == "atomic",
        **_constants(tile, config.block_m, fp8=scales is not None),
    )


def cluster_stages(  # noqa: PLR0913 - the parts of two launches
    rows: ExpertInput, weights: Weights, placed: Sorted, config: KernelConfig, processors: int, target: Tensor
) -> None:
    """Write the weighted result of each place to target [P, H], by the kernels in CUDA C++."""
    hidden, scales, routing = sorted_copy(rows, placed, processors, cluster=True)
    routes, inter = placed.order.numel(), weights.w2.shape[2]
    activation = scratch(hidden, routes, inter)
    activation_scales = None if scales is None else scratch(scales, inter // BLOCK, scales.shape[1])
    between = cluster_products.Rows(activation, activation_scales)
    tables = placed.experts, placed.tiles
    first, second = (
        cluster_products.layer_of(stage, matrix, config, placed.local)
        for stage, matrix in ((1, weights.w1), (2, weights.w2))
    )
    given, result = cluster_products.Rows(hidden, scales), cluster_products.Rows(target, None)
    cluster_products.multiply(first, given, weights.w1, weights.scales1, tables, None, between, processors)
    cluster_products.multiply(second, between, weights.w2, weights.scales2, tables, routing, result, processors)


def sorted_copy(
    rows: ExpertInput, placed: Sorted, processors: int, *, cluster: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return rows and scales in the order of places.

    For `cluster`, cluster_products.cu, also the routing weights; scales are [H/128, places] then.
    """
    routes, topk, width = placed.order.numel(), rows.ids.shape[1], rows.hidden.shape[1]
    hidden = scratch(rows.hidden, routes, width)
    blocks = 0 if rows.scales is None else rows.scales.shape[1]
    pitch = -(-routes // _ALIGNED) * _ALIGNED
    scales = None
    if rows.scales is not None:
        scales = scratch(rows.scales, *((blocks, pitch) if cluster else (routes, blocks)))
    routing = scratch(rows.weights, routes) if cluster else None
    launch(
        sort_kernels.permute_rows,
        (8 * processors,),
        rows.hidden,
        rows.scales,
        rows.weights,
        placed.order,
        placed.experts,
        hidden,
        scales,
        routing,
        pitch,
        TOPK=topk,
        LOCAL=placed.local,
        H=width,
        BLOCK_H=min(_power_of_two(width), 8 * _COPY_COLUMNS if cluster else _COPY_COLUMNS),
        SCALES=blocks,
        SCALE_WIDTH=_power_of_two(max(blocks, 1)),
        CLUSTER=cluster,
    )
    return hidden, scales, routing


def _constants(tile: Tile, block_m: int, *, fp8: bool) -> dict[str, Any]:
    return {
        "BLOCK_M": block_m,
        "BLOCK_N": tile.n,
        "BLOCK_K": tile.k,
        "SWAP": tile.swap,
        "FP8": fp8,
        "FLATTEN": tile.flatten,
        "num_stages": tile.stages,
        "num_warps": tile.warps,
    }


def _programs(tile: Tile, processors: int) -> tuple[int]:
    return (tile.programs * processors,)


def _descriptor(matrix: Tensor, rows: int, columns: int) -> TensorDescriptor:
    return TensorDescriptor.from_tensor(matrix, [rows, columns])


@lru_cache
def _triton_type(dtype: torch.dtype) -> Any:
    import triton.language as tl

    return {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}[dtype]


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()
