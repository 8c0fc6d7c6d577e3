"""What must come out: without a dense product where the inputs are exact, in float64 where they are not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from distbench.errors import DistbenchError
from distbench.workload import gaussian
from distbench.workload.batch import TokenBatch
from distbench.workload.exact import Patterns, expert_patterns
from distbench.workload.plan import ExactPlan
from distbench.workload.quantize import dequantize
from distbench.workload.steps import rows_at_a_time

_CHUNK_BYTES = 8 << 20
_BLOCK_BYTES = 64 << 20

# The T routes of a tile lie side by side in one integer of this type, so that one gather moves all of them.
_LANES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Tiles(NamedTuple):
    """Routes by expert, T of the same one side by side: experts [t], tokens [t, T], units float32 [t, T].

    A route's units are its weight over the smallest weight. An expert's first lanes may have no route: token n, one
    past the last.
    """

    experts: Tensor
    tokens: Tensor
    units: Tensor


def expert_rows(plan: ExactPlan, seed: int, batch: TokenBatch, experts: range) -> Tensor:
    """Return the weighted sum of those of each row's experts that are in `experts`: bf16 [m, H].

    Sums are whole numbers, as float32 holds them; zeros are +0.0.

    Raises:
        DistbenchError: a sum exceeds what bf16, or fp8 in combine, holds exactly, so the batch is not one of the plan.

    """
    hidden = dequantize(batch.hidden, batch.scales)
    output = torch.empty(hidden.shape, dtype=torch.bfloat16, device=hidden.device)
    step = rows_at_a_time(_BLOCK_BYTES, plan.hidden_size * 8, hidden.device)
    for start in range(0, hidden.shape[0], step):
        part = slice(start, start + step)
        ids = batch.ids[part].long()
        wanted = torch.where((ids >= experts.start) & (ids < experts.stop), ids, -1)
        tiles = _tile(wanted, batch.weights[part] * plan.weight_ratio, plan.num_experts)
        total = _sum_units(plan, seed, hidden[part].to(torch.int8), tiles)
        most = float(total.abs().max())
        if not most <= plan.max_units:
            message = f"oracle: a sum of {most:g} units, allowed are {plan.max_units}; the batch is not one of the plan"
            raise DistbenchError(message)
        output[part] = total.mul_(plan.unit)
    return output


def reference_rows(intermediate_size: int, seed: int, batch: TokenBatch, experts: range) -> Tensor:
    """Return the same sum for gaussian inputs, computed in float64 and rounded once: float32 [m, H].

    The weights of one expert at a time are made anew, so this is for a few rows.
    """
    ids, hidden = batch.ids, dequantize(batch.hidden, batch.scales).double()
    total = torch.zeros_like(hidden)
    for expert in sorted(set(ids.flatten().tolist()) & set(experts)):
        rows, slots = (ids == expert).nonzero().unbind(1)
        only = torch.tensor([expert], device=ids.device)
        w1, w2 = gaussian.dense_weights(hidden.shape[1], intermediate_size, seed, only)
        gate, up = _product(hidden[rows], w1[0]).chunk(2, dim=1)
        result = _product(functional.silu(gate) * up, w2[0])
        total.index_add_(0, rows, result * batch.weights[rows, slots].double().unsqueeze(1))
    return total.float()


def _product(rows: Tensor, weight: Tensor) -> Tensor:
    step = rows_at_a_time(_BLOCK_BYTES, weight.shape[1] * 8, weight.device)
    return torch.cat([rows @ part.double().t() for part in torch.split(weight, step)], dim=1)


def _tile(experts: Tensor, units: Tensor, num_experts: int) -> _Tiles:
    """Put the routes of experts int64 [m, k] (-1: none) into as wide tiles as an average expert fills."""
    rows, topk = experts.shape
    flat = experts.flatten()
    counts = torch.bincount(flat + 1, minlength=num_experts + 1)
    nowhere, counts = int(counts[0]), counts[1:]
    routes = flat.argsort(stable=True)[nowhere:]
    average = len(routes) // max(int(counts.count_nonzero()), 1)
    shift = min(max(average.bit_length() - 1, 0), 3)
    num_tiles = (counts + ((1 << shift) - 1)) >> shift
    vacant = (num_tiles << shift) - counts
    place = torch.arange(len(routes), device=flat.device) + vacant.cumsum(0).repeat_interleave(counts)
    tile_experts = torch.arange(num_experts, device=flat.device).repeat_interleave(num_tiles)
    tokens = torch.full((len(tile_experts), 1 << shift), rows, device=flat.device)
    tokens.view(-1).scatter_(0, place, routes.div(topk, rounding_mode="floor"))
    lanes = units.new_zeros(tokens.shape)
    lanes.view(-1).scatter_(0, place, units.flatten().index_select(0, routes))
    return _Tiles(tile_experts, tokens, lanes)


def _sum_units(plan: ExactPlan, seed: int, hidden: Tensor, tiles: _Tiles) -> Tensor:
    """Return whole multiples of the plan's unit, float32 [m, H], from hidden int8 [m, H]."""
    signed = torch.cat([hidden, -hidden], dim=1)
    signed = torch.cat([signed, signed.new_zeros(1, signed.shape[1])])
    total = torch.zeros(signed.shape[0], plan.hidden_size, device=hidden.device)
    entries = plan.up_entries * plan.live_rows + plan.down_entries * plan.hidden_size
    width = tiles.tokens.shape[1]
    step = rows_at_a_time(_CHUNK_BYTES, entries * (width + 16), hidden.device)
    for start in range(0, len(tiles.experts), step):
        chunk = _Tiles(*(part[start : start + step] for part in tiles))
        routed = signed.index_select(0, chunk.tokens.flatten()).view(*chunk.tokens.shape, -1)
        result = _tile_outputs(routed.transpose(1, 2).contiguous(), expert_patterns(plan, seed, chunk.experts))
        rows = result.transpose(1, 2).reshape(-1, plan.hidden_size) * chunk.units.view(-1, 1)
        total.index_add_(0, chunk.tokens.flatten(), rows)
    return total[:-1]


def _tile_outputs(signed: Tensor, patterns: Patterns) -> Tensor:
    """Return what each route's expert makes of its token, in gate steps: int8 [t, H, T].

    signed int8 [t, 2H, T] holds each hidden column, then each negated, as the entries' numbers want them.
    """
    first = _pick(signed, patterns.first)
    gate = first[:, 0] + signed[:, :1]
    activation = first[:, 1:].sum(1, dtype=torch.int8) * gate
    both = torch.cat([activation, -activation], dim=1)
    return _pick(both, patterns.down).sum(1, dtype=torch.int8)


def _pick(values: Tensor, entries: Tensor) -> Tensor:
    """Return values int8 [t, N, T] at entries int32 [t, ..., r]: int8 [t, ..., r, T]."""
    tiles, places, width = values.shape
    first = torch.arange(0, tiles * places, places, dtype=entries.dtype, device=values.device)
    index = entries.flatten(1) + first.unsqueeze(1)
    picked = values.view(_LANES[width]).flatten().index_select(0, index.flatten())
    return picked.view(torch.int8).view(*entries.shape, width)
