"""Expected outputs: without a dense product where inputs are exact, in float64 where they are not."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from distbench.errors import DistbenchError
from distbench.workload.batch import TokenBatch
from distbench.workload.chunking import rows_at_a_time
from distbench.workload.codes import code_groups
from distbench.workload.exact import Patterns, sum_patterns
from distbench.workload.exact_bias import sum_biases
from distbench.workload.exact_plan import ExactPlan
from distbench.workload.places import Places, places_of
from distbench.workload.probe_plan import ProbePlan
from distbench.workload.probes import (
    FIRST_WIDE,
    WIDE_VALUES,
    GroupedProbes,
    grouped_probes,
    routing_factors,
    row_values,
)
from distbench.workload.quantize import dequantize, fp8_dtype, saturated

_CHUNK_BYTES = 8 << 20
_BLOCK_BYTES = 64 << 20
# Chunks on a device are this much larger again: each takes 30 launches or more.
_LARGER_ON_DEVICE = 4

# The T routes of a tile lie side by side in one integer of this type, so that a gather moves them and an addition adds
# them all. A lane is a byte that holds a number plus a bias, which makes it non-negative: no addition carries into the
# next lane.
_LANES = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class _Routes(NamedTuple):
    """Routes sorted by expert: experts [r], tokens [r], weights float32 [r]."""

    experts: Tensor
    tokens: Tensor
    weights: Tensor


class _Tiles(NamedTuple):
    """Routes sorted by expert, T of one expert side by side: experts [t], tokens [t, T], weights float32 [t, T].

    An expert's first lanes may hold no route: their token is 0 and their weight is 0.
    """

    experts: Tensor
    tokens: Tensor
    weights: Tensor


def expert_rows(plan: ExactPlan, seed: int, batch: TokenBatch, experts: range) -> Tensor:
    """Return the weighted sum over those experts of each row that are in `experts`: bf16 [m, H].

    Sums are integers that float32 holds exactly. A probe is one expert's value, rounded to bf16. Zeros are +0.0.

    Raises:
        DistbenchError: a sum exceeds the exact range of bf16, or of fp8 in combine, so the batch is not of the plan.
    """
    hidden = batch.hidden if batch.scales is None else dequantize(batch.hidden, batch.scales)
    output = torch.empty(hidden.shape, dtype=torch.bfloat16, device=hidden.device)
    places = places_of(plan, hidden.device)
    step = rows_at_a_time(_BLOCK_BYTES, plan.hidden_size * 8, hidden.device)
    for start in range(0, hidden.shape[0], step):
        part = slice(start, start + step)
        ids = batch.ids[part].long()
        wanted = torch.where((ids >= experts.start) & (ids < experts.stop), ids, -1)
        routes, tiles = _routes(wanted, batch.weights[part], plan.num_experts)
        whole = hidden[part].to(torch.int8)  # wide columns may not fit; no caller reads them
        total = _sum_units(plan, seed, whole, tiles)
        most = total.abs().max() if total.numel() else total.new_zeros(())
        parts = [total.mul_(plan.unit).bfloat16()]
        if plan.probes is not None:
            wide = _wide_bits(hidden[part], places)
            code = _code_of(hidden[part], places)
            parts.append(_probe_sums(plan, plan.probes, seed, _Rows(_signed(whole), wide, code), routes).bfloat16())
        if plan.guard_sums:
            parts.append(total.new_zeros(total.shape[0], 1, dtype=torch.bfloat16))
        torch.index_select(torch.cat(parts, dim=1), 1, places.output, out=output[part])
        if not (units := float(most)) <= plan.max_units:
            message = (
                f"oracle: a sum of {units:g} units exceeds {plan.max_units}; the batch does not belong to the plan"
            )
            raise DistbenchError(message)
    return output


def returned_rows(plan: ExactPlan, rows: Tensor) -> Tensor:
    """Return expert rows [m, H] as they arrive after the trip back in the case's combine_quant, scaled or not.

    A block's scale, if any, is a power of two, and no value of the block is small enough for it to change the rounding.
    A value above the largest number of e4m3 saturates to that number times the scale.
    """
    if plan.combine == "none":
        return rows
    small = saturated(rows.float(), fp8_dtype(plan.fp8_format)).to(rows.dtype)
    return torch.where(rows.abs() > plan.largest_fp8, rows, small)


def _routes(experts: Tensor, weights: Tensor, num_experts: int) -> tuple[_Routes, _Tiles]:
    """Return the routes of experts int64 [m, k] (-1: none), and the same in tiles as wide as an expert's average."""
    topk = experts.shape[1]
    flat = experts.flatten()
    counts = torch.bincount(flat + 1, minlength=num_experts + 1)
    nowhere, *known = counts.tolist()
    counts, routes = counts[1:], flat.argsort(stable=True)[nowhere:]
    average = len(routes) // max(num_experts - known.count(0), 1)
    shift = min(max(average.bit_length() - 1, 0), 3)
    num_tiles = (counts + ((1 << shift) - 1)) >> shift
    vacant = (num_tiles << shift) - counts
    place = torch.arange(len(routes), device=flat.device) + vacant.cumsum(0).repeat_interleave(
        counts, output_size=len(routes)
    )
    tile_experts = torch.arange(num_experts, device=flat.device).repeat_interleave(
        num_tiles, output_size=sum((count + (1 << shift) - 1) >> shift for count in known)
    )
    tokens = routes.new_zeros(len(tile_experts), 1 << shift)
    sources = routes.div(topk, rounding_mode="floor")
    tokens.view(-1).scatter_(0, place, sources)
    shares = weights.flatten().index_select(0, routes)
    lanes = weights.new_zeros(tokens.shape)
    lanes.view(-1).scatter_(0, place, shares)
    return _Routes(flat.index_select(0, routes), sources, shares), _Tiles(tile_experts, tokens, lanes)


def _signed(whole: Tensor) -> Tensor:
    """Return hidden int8 [m, H] as int8 [m, 2H + 1]: columns, their negatives, a zero."""
    return torch.cat([whole, -whole, whole.new_zeros(whole.shape[0], 1)], dim=1)


def _at_a_time(row_bytes: int, device: torch.device) -> int:
    """Return the number of routes or tiles in a chunk, of `row_bytes` each."""
    return rows_at_a_time(_CHUNK_BYTES * (1 if device.type == "cpu" else _LARGER_ON_DEVICE), row_bytes, device)


def _sum_units(plan: ExactPlan, seed: int, whole: Tensor, tiles: _Tiles) -> Tensor:
    """Return the sum columns as integer multiples of the plan's unit, float32 [m, columns], from hidden int8 [m, H]."""
    total = torch.zeros(whole.shape[0], plan.sum_columns, device=whole.device)
    entries = plan.up_entries * plan.sum_rows + plan.down_entries * plan.sum_columns
    width = tiles.tokens.shape[1]
    step = _at_a_time(entries * (width + 16), whole.device)
    biased = whole + 1
    for start in range(0, len(tiles.experts), step):
        chunk = _Tiles(*(part[start : start + step] for part in tiles))
        routed = biased.index_select(0, chunk.tokens.flatten()).view(*chunk.tokens.shape, -1)
        patterns, ups = sum_patterns(plan, seed, chunk.experts), None
        if plan.formula.bias:
            ups, outputs = sum_biases(plan, seed, chunk.experts)
        result = _tile_outputs(plan, routed.transpose(1, 2).contiguous(), patterns, ups)
        if plan.formula.bias:
            result += outputs.unsqueeze(2)
        units = chunk.weights.view(-1, 1) * plan.weight_ratio
        units = units.square() if plan.formula.weigh_first else units
        rows = result.transpose(1, 2).reshape(-1, plan.sum_columns) * units
        total.index_add_(0, chunk.tokens.flatten(), rows)
    return total


def _tile_outputs(plan: ExactPlan, hidden: Tensor, patterns: Patterns, ups: Tensor | None) -> Tensor:
    """Return the expert output of each route, in gate steps, int8 [t, columns, T], from hidden plus 1, int8 [t, H, T].

    `ups` int8 [t, S] is added to up values; None for the formula's shift.

    A sum of n entries between -b and b, each plus b, is the sum plus n * b; the negative of an entry is 2b minus it.
    Up values with what is added are at most `plan.up_bound`, the bias of the second sum.
    """
    tiles, _, width = hidden.shape
    bound, lanes = plan.up_bound, hidden.view(_LANES[width]).squeeze(2)
    activation = _added(_two_signed(lanes, 2), patterns.up)
    more = bound - plan.up_entries
    if ups is not None:
        activation += (ups + more).to(lanes.dtype) * _in_all_lanes(1, lanes)
    elif more:
        activation += _in_all_lanes(plan.formula.up_shift + more, lanes)
    result = _added(_two_signed(activation, 2 * bound), patterns.down)
    outputs = result.view(torch.int8).view(tiles, -1, width)
    outputs -= bound * plan.down_entries
    return outputs


def _two_signed(lanes: Tensor, twice: int) -> Tensor:
    """Return numbers plus a bias, [t, N], and behind them their negatives plus it; `twice` the bias."""
    return torch.cat([lanes, _in_all_lanes(twice, lanes) - lanes], dim=1)


def _in_all_lanes(value: int, lanes: Tensor) -> int:
    """Return the word that holds `value` in each of its lanes."""
    return int.from_bytes(bytes([value] * lanes.element_size()), "little")


def _added(lanes: Tensor, entries: Tensor) -> Tensor:
    """Return the sums over r of lanes [t, N] at entries int32 [t, r, n]: [t, n]."""
    tiles, places = lanes.shape
    first = torch.arange(0, tiles * places, places, dtype=entries.dtype, device=lanes.device)
    index = entries.flatten(1) + first.unsqueeze(1)
    picked = lanes.flatten().index_select(0, index.flatten())
    return picked.view(entries.shape).sum(1, dtype=lanes.dtype)


class _Rows(NamedTuple):
    """Rows of tokens: signed int8 [m, 2H + 1], wide int64 [m, Wc + 1], code int64 [m]."""

    signed: Tensor
    wide: Tensor
    code: Tensor


def _wide_bits(hidden: Tensor, places: Places) -> Tensor:
    """Return each wide column's index among the bf16 numbers from 1, int64 [m, Wc + 1]; the last column is zero."""
    bits = hidden.index_select(1, places.wide).bfloat16().view(torch.int16).long() - FIRST_WIDE
    return functional.pad(bits.clamp_(0, WIDE_VALUES - 1), (0, 1))


def _code_of(hidden: Tensor, places: Places) -> Tensor:
    """Return the code column of each token that is 1, int64 [m], and m for none."""
    found = hidden.index_select(1, places.codes).max(1)
    return torch.where(found.values > 0, found.indices, len(places.codes))


def _probe_sums(plan: ExactPlan, probes: ProbePlan, seed: int, rows: _Rows, routes: _Routes) -> Tensor:
    """Return the probe columns by group, float32 [m, C]: each route adds those of the group where it is on."""
    groups, slots = probes.live_groups, probes.column_slots
    count = rows.code.shape[0]
    total = torch.zeros(count * groups, slots, device=rows.code.device)
    group = code_groups(plan, rows.code.device)[routes.experts, rows.code.index_select(0, routes.tokens)]
    on = (group < groups).nonzero().flatten()
    values = row_values(plan, rows.code.device)
    entries = sum(plan.gate_entries) + 4
    step = _at_a_time(entries * probes.row_slots * 16, rows.code.device)
    for chunk in on.split(step):
        experts, tokens, weights = (part.index_select(0, chunk) for part in routes)
        where = group.index_select(0, chunk)
        made = grouped_probes(plan, seed, experts, where)
        outputs = _probe_outputs(plan, rows, tokens, made, values, weights)
        total.index_add_(0, tokens * groups + where, outputs * weights.unsqueeze(1))
    return total.view(count, -1)


def _probe_outputs(  # noqa: PLR0913 - the parts of a probe
    plan: ExactPlan, rows: _Rows, tokens: Tensor, made: GroupedProbes, values: Tensor, weights: Tensor
) -> Tensor:
    """Return the output of one group of one expert for each of tokens [r]: float32 [r, D].

    Of routing weights [r] that come first, only what they do to the gate is in it.
    """
    first = (tokens * rows.signed.shape[1]).to(torch.int32)
    index = made.entries + first.view(-1, 1, 1)
    read = rows.signed.flatten().index_select(0, index.flatten()).view(index.shape)
    number = read.sum(1, dtype=torch.int32) + read[:, : plan.gate_entries[0]].sum(1, dtype=torch.int32)
    first = (tokens * rows.wide.shape[1]).to(torch.int32)
    wide = rows.wide.flatten().index_select(0, (made.wide + first.unsqueeze(1)).flatten())
    place = made.first + number + wide.view(number.shape)
    if len(routing_factors(plan)) > 1:
        place = place + (weights < 1).unsqueeze(1) * (len(values) // 2)
    result = values.index_select(0, place.flatten()).view(place.shape)
    return result.gather(1, made.read) * made.weight
