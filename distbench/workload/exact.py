"""Inputs for which every correct kernel gives the same bits: sums that are exact in any order, and probes.

Sums: hidden columns are -1, 0 or 1, the gate of a sum row is 32, and silu(32) is 32 in float32 (e**-32 is below half an
ulp of 1). Each up row holds U entries of +-1, each w2 row V of them; routing weights are 1 or 1/2. All partial sums of
an output element are then whole numbers of at most k*V*U*2 units of 32 * 1/2, which bf16 holds exactly up to 256. Sums
detect lost, doubled and swapped contributions.

Probes (`distbench.workload.probes`): every other output column reads one intermediate row of one expert, so no order of
additions changes a bit, and the row may hold values that round: gates and up values at the points of
`distbench.workload.points`, switched by the code columns of the token. Probes detect faults in the activation, in the
weights and in every column; wide columns detect faults in the mantissa and the scale of hidden states.

fp8 combine: w2 holds 1/4 instead of 1 in sums, which stay within 16 units, and e4m3 holds these exactly; probes are
rounded as the oracle says.

fp8 dispatch: the last column of each 128 is 1.75 (1.875 where the device's fp8 ends at 240) times a power of two that
differs between rows and between blocks, so its block's scale is a power of two and quantising loses nothing. The column
before it is always 0, and so is one intermediate row of each 128; the weights that they multiply are large enough to
give each 128 x 128 block of weights its own scale. Two intermediate rows of each 128 are guards: 448 (480) times a
power of two that differs between blocks and between tokens, which sets the scales of a quantised intermediate. Output
columns read the difference of the two guards.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.workload.bits import byte_columns
from distbench.workload.chunking import rows_at_a_time
from distbench.workload.codes import code_columns, code_groups
from distbench.workload.draws import are_kept, bytes_of, sum_draws
from distbench.workload.exact_bias import gate_biases
from distbench.workload.exact_plan import BLOCK, GUARD_GATE, GUARD_STEP, ExactPlan
from distbench.workload.places import Places, live_column, places_of
from distbench.workload.points import WIDE_POWERS
from distbench.workload.probe_plan import ProbePlan
from distbench.workload.probes import Probes, minus, physical, probe_patterns, switches, wide_up_signs

_CHUNK_ELEMENTS = 4 << 20
# The smallest magnitude that sets the scale of a block of weights: it exceeds all other weights.
_FIRST_SCALE, _SECOND_SCALE = 128.0, 8.0


class Patterns(NamedTuple):
    """Entries of the sums of e experts, as integers.

    up int32 [e, U, S]: hidden columns, plus H where the sign is minus. down int32 [e, V, columns]: numbers of sum rows,
    plus S where the sign is minus.
    """

    up: Tensor
    down: Tensor


def sum_patterns(plan: ExactPlan, seed: int, experts: Tensor) -> Patterns:
    """Return the entries of the sums of `experts`, global ids int64 [e], repeats allowed, on their device.

    Entries of a row are distinct. An expert reads all payload columns and all sum rows; where it has too few rows,
    several consecutive experts do so together. Entries that are few for the device are made once for all experts.
    """
    if are_kept(plan, experts.device):
        return Patterns(*(part.index_select(0, experts) for part in _all_patterns(plan, seed, experts.device)))
    used, position = torch.unique(experts, return_inverse=True)
    return Patterns(*(part.index_select(0, position) for part in _make_patterns(plan, seed, used)))


@lru_cache(maxsize=1)
def _all_patterns(plan: ExactPlan, seed: int, device: torch.device) -> Patterns:
    return _make_patterns(plan, seed, torch.arange(plan.num_experts, device=device))


def _make_patterns(plan: ExactPlan, seed: int, experts: Tensor) -> Patterns:
    rows, columns = plan.sum_rows, plan.sum_columns
    drawn = sum_draws(plan, seed, experts)
    bits = bytes_of(drawn.words["minus"], rows + columns).unsqueeze(1)
    up = physical(plan, drawn.places["up"]) + minus(bits[:, :, :rows], plan.up_entries) * plan.hidden_size
    down = drawn.places["down"] + minus(bits[:, :, rows:], plan.down_entries) * rows
    return Patterns(up, down)


def dense_weights(plan: ExactPlan, seed: int, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return w1 bf16 [e, 2I, H], gate rows before up rows, and w2 bf16 [e, H, I] of `experts` int64 [e]."""
    hidden = plan.hidden_size
    sums = sum_patterns(plan, seed, experts)
    places, starts = places_of(plan, experts.device), _starts(plan, experts.numel(), experts.device)
    if plan.is_small:
        w1, w2 = (part.clone() for part in _kept_unseeded(plan, tuple(experts.tolist()), experts.device))
    else:
        w1, w2 = _unseeded(plan, experts)
    _put(w1, starts.ups, sums.up % hidden, torch.where(sums.up >= hidden, -1.0, 1.0))
    rows = places.sum_rows[sums.down % plan.sum_rows]
    _put(w2, starts.sums, rows, torch.where(sums.down >= plan.sum_rows, -plan.down_step, plan.down_step))
    if plan.formula.bias:
        w1[:, places.sum_rows, 0] -= gate_biases(plan, seed, experts).bfloat16()
    if plan.guard_rows:
        _put_scales(plan, seed, experts, w1, w2)
    if plan.probes is not None:
        probes = probe_patterns(plan, seed, experts)
        _put_probes(plan, places, probes, w1, starts.payloads)
        read = places.probe_rows[probes.read * plan.probes.live_groups + _groups(plan.probes, experts.device)]
        _put(w2, starts.probes, read.unsqueeze(1), probes.weight.unsqueeze(1))
    return w1, w2


class _Starts(NamedTuple):
    """Where rows of e experts begin in their flattened weights, int64 [e, 1, rows].

    In w1: `ups` of sum rows, and rows with `payloads` of probe rows. In w2: columns of `sums` and of `probes`.
    """

    ups: Tensor
    payloads: Tensor
    sums: Tensor
    probes: Tensor


@lru_cache(maxsize=4)
def _starts(plan: ExactPlan, count: int, device: torch.device) -> _Starts:
    hidden, inter, places = plan.hidden_size, plan.intermediate_size, places_of(plan, device)
    payloads = places.probe_rows if plan.probes is None else _payloads(plan, device)[0]
    return _Starts(
        _starts_of(places.sum_rows + inter, count, 2 * inter, hidden),
        _starts_of(payloads, count, 2 * inter, hidden),
        _starts_of(places.sum_columns, count, hidden, inter),
        _starts_of(places.probe_columns, count, hidden, inter),
    )


def _starts_of(rows: Tensor, count: int, height: int, width: int) -> Tensor:
    """Offsets of `rows` [r] of `count` experts in flattened weights [e, height, width]: int64 [e, 1, r]."""
    first = torch.arange(count, device=rows.device).view(-1, 1, 1) * height
    return (first + rows) * width


@lru_cache(maxsize=1)
def _kept_unseeded(plan: ExactPlan, experts: tuple[int, ...], device: torch.device) -> tuple[Tensor, Tensor]:
    return _unseeded(plan, torch.tensor(experts, device=device))


def _unseeded(plan: ExactPlan, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return w1 and w2 of `dense_weights` with the entries that no seed changes."""
    count, hidden, inter = experts.numel(), plan.hidden_size, plan.intermediate_size
    w1 = torch.zeros(count, 2 * inter, hidden, dtype=torch.bfloat16, device=experts.device)
    w2 = torch.zeros(count, hidden, inter, dtype=torch.bfloat16, device=experts.device)
    w1[:, :, 0] = _constants(plan, experts.device)
    if plan.guard_rows:
        _put_guards(plan, experts, places_of(plan, experts.device), w1, w2)
    if plan.probes is not None:
        _put_switches(plan, plan.probes, experts, w1)
    return w1, w2


@lru_cache(maxsize=8)
def _constants(plan: ExactPlan, device: torch.device) -> Tensor:
    """Return the values of w1's rows at column 0, bf16 [2I]."""
    places, inter = places_of(plan, device), plan.intermediate_size
    values = torch.zeros(2 * inter, dtype=torch.bfloat16, device=device)
    values[places.sum_rows] = plan.gate_step
    if plan.probes is not None and not plan.formula.bias:  # off is 0: what the activation adds to up is taken off again
        values[places.probe_rows[: plan.probes.first_up_row] + inter] = -plan.formula.up_shift
    for guards in (places.guards, places.twins):
        values[guards] = GUARD_GATE
        values[guards + inter] = _guard_ups(plan, device)
    if plan.probes is not None and plan.probes.hot_rows:
        values[places.probe_rows[-plan.probes.hot_rows :] + inter] = plan.hot_up
    return values


def _guard_ups(plan: ExactPlan, device: torch.device) -> Tensor:
    """Return the guards' up values by block, bf16 [blocks]; with GUARD_GATE, neighbouring blocks' scales differ."""
    block = torch.arange(plan.intermediate_size // BLOCK if plan.guard_rows else 0, device=device)
    return (plan.guard_up * (1 + block % 2)).bfloat16()


def _put_guards(plan: ExactPlan, experts: Tensor, places: Places, w1: Tensor, w2: Tensor) -> None:
    """Double the guards under every second code column, and let outputs read the difference of two guards."""
    inter, device = plan.intermediate_size, experts.device
    doubling = places.codes[1::2]
    for guards in (places.guards, places.twins):
        w1[:, guards.unsqueeze(1) + inter, doubling] = _guard_ups(plan, device).unsqueeze(1)
    if plan.guard_sums:
        block = (torch.arange(plan.guard_sums, device=device) + experts.unsqueeze(1) * plan.guard_sums).unsqueeze(1)
        block %= len(places.guards)
        step = torch.full(block.shape, GUARD_STEP, device=device)
        starts = _starts_of(places.guard_columns, *w2.shape)
        _put(w2, starts, places.guards[block], step)
        _put(w2, starts, places.twins[block], -step)


def _put_scales(plan: ExactPlan, seed: int, experts: Tensor, w1: Tensor, w2: Tensor) -> None:
    """Put weights that always multiply zero into each block of weights, so that neighbouring blocks' scales differ."""
    inter, device, places = plan.intermediate_size, experts.device, places_of(plan, experts.device)
    tall, wide = len(places.zero_rows), len(places.zeros)
    bits = byte_columns(seed, "scales", experts, 3 * tall * wide, device).view(-1, 3, tall, wide)
    odd = (torch.arange(tall, device=device).unsqueeze(1) + torch.arange(wide, device=device)).unsqueeze(0)
    odd = (odd + experts.view(-1, 1, 1)) % 2
    for part, rows in enumerate((places.zero_rows, places.zero_rows + inter)):
        power = 2 * (bits[:, part] & 1) + (odd + part) % 2
        w1[:, rows.unsqueeze(1), places.zeros] = _FIRST_SCALE * (1 << power.int()).bfloat16()
    power = 2 * (bits[:, 2] & 1) + odd
    down = torch.arange(wide, device=device) * BLOCK + 4 * (torch.arange(tall, device=device).unsqueeze(1) % 32) + 3
    w2[:, down, places.zero_rows.unsqueeze(1)] = _SECOND_SCALE * (1 << power.int()).bfloat16()


def _put_probes(plan: ExactPlan, places: Places, made: Probes, w1: Tensor, starts: Tensor) -> None:
    """Add the payloads of probe rows to w1; entries that a row does not have are added as zero."""
    _, coefficients = _payloads(plan, w1.device)
    wide = torch.cat([places.wide, places.wide.new_zeros(1)])[made.wide].unsqueeze(1)
    entries = torch.cat([made.entries, wide], dim=1)
    values = torch.where(entries >= plan.hidden_size, -coefficients, coefficients)
    index = starts + entries % plan.hidden_size
    w1.view(-1).index_add_(0, index.flatten(), values.flatten().bfloat16())


@lru_cache(maxsize=8)
def _payloads(plan: ExactPlan, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the rows of w1 with payloads of probe rows, int64 [R], and the magnitudes of their entries [n + 1, R].

    The last entry is the wide column. An entry that a kind of row lacks is zero.
    """
    probes, points, places = plan.probes, plan.points, places_of(plan, device)
    assert probes is not None  # noqa: S101 - called only for plans that have probes
    doubled, single = plan.gate_entries
    ups = plan.up_payload
    gates, first_up = probes.gate_rows, probes.first_up_row
    wide_up = first_up + probes.up_rows
    rows = places.probe_rows.clone()
    rows[first_up:] += plan.intermediate_size
    coefficients = torch.zeros(doubled + max(single, ups) + 1, probes.rows, device=device)
    coefficients[:doubled, :gates] = 2 * points.step
    coefficients[doubled : doubled + single, :gates] = points.step
    coefficients[-1, gates:first_up] = points.wide_step
    coefficients[doubled : doubled + ups, first_up:wide_up] = 1
    coefficients[-1, wide_up : wide_up + probes.wide_up_rows] = wide_up_signs(plan, device)
    return rows, coefficients


def _put_switches(plan: ExactPlan, probes: ProbePlan, experts: Tensor, w1: Tensor) -> None:
    """Put its switch into each probe row, at the code columns that switch its expert on in the row's group."""
    places = places_of(plan, experts.device)
    group = torch.arange(probes.rows, device=w1.device) % probes.live_groups
    on = code_groups(plan, w1.device)[experts, :-1].unsqueeze(1) == group.unsqueeze(1)
    rows = places.probe_rows.clone()
    rows[: probes.first_up_row] += plan.intermediate_size
    w1[:, rows.unsqueeze(1), places.codes] = (on * switches(plan, experts).unsqueeze(2)).bfloat16()


@lru_cache(maxsize=8)
def _groups(probes: ProbePlan, device: torch.device) -> Tensor:
    return torch.arange(probes.columns, device=device) % probes.live_groups


def hidden_states(plan: ExactPlan, seed: int, keys: Tensor, ids: Tensor) -> Tensor:
    """Return the rows of the tokens with keys int64 [n] (`token_keys`) and experts `ids` [n, k]: bf16 [n, H]."""
    hidden = torch.empty(keys.numel(), plan.hidden_size, dtype=torch.bfloat16, device=keys.device)
    places = places_of(plan, keys.device)
    step = rows_at_a_time(_CHUNK_ELEMENTS, plan.hidden_size, keys.device)
    for start in range(0, keys.numel(), step):
        part = keys[start : start + step]
        bits = byte_columns(seed, "hidden", part, plan.hidden_size, keys.device).to(torch.int16)
        rows = hidden[start : start + step]
        rows.copy_(((bits * 3) >> 8) - 1)
        rows.index_copy_(1, places.wide, _wide_values(plan, part, bits.index_select(1, places.wide)))
        if plan.block_scaled:
            rows.index_fill_(1, places.zeros, 0)
        if plan.probes is not None:
            rows.index_fill_(1, places.codes, 0)
            first, last = live_column(plan, plan.payload_columns), live_column(plan, plan.live_columns - 1)
            draw = bits[:, first] | bits[:, last].int() << 8
            column = code_columns(plan, draw, ids[start : start + step])
            rows.scatter_(1, places.marks[column].unsqueeze(1), 1.0)
    hidden[:, 0] = 1.0
    return hidden


def _wide_values(plan: ExactPlan, keys: Tensor, bits: Tensor) -> Tensor:
    """Return the wide columns [n, Wc] from random bytes: a mantissa times 2**0 to 2**4, parity by row and block."""
    wide = plan.points.wide
    odd = (keys.unsqueeze(1) + torch.arange(bits.shape[1], device=keys.device)) & 1
    power = odd + 2 * (((bits >> 6) * (3 - odd)) >> 2)
    return _wide_table(plan, keys.device)[(((bits & 63) * len(wide)) >> 6) * WIDE_POWERS + power]


@lru_cache(maxsize=8)
def _wide_table(plan: ExactPlan, device: torch.device) -> Tensor:
    values = [mantissa / 128 * 2**power for mantissa in plan.points.wide for power in range(WIDE_POWERS)]
    return torch.tensor(values, dtype=torch.bfloat16, device=device)


def routing_weights(plan: ExactPlan, seed: int, keys: Tensor) -> Tensor:
    """Return the weights of the tokens with keys int64 [n]: float32 [n, k], each 1 or 1/2, or all 1.

    A token's first two weights differ, and so do the first weights of neighbouring tokens.
    """
    if plan.weight_ratio == 1:
        return torch.ones(keys.numel(), plan.topk, device=keys.device)
    bits = byte_columns(seed, "weights", keys, plan.topk, keys.device) & 1
    bits[:, 0] = keys & 1
    bits[:, 1:2] = 1 - bits[:, :1]
    return 1.0 - 0.5 * bits


def _put(weights: Tensor, starts: Tensor, columns: Tensor, values: Tensor) -> None:
    """Write values, shaped like columns [e, entries, r], into weights at rows that begin at `starts` [e, 1, r].

    No place occurs twice. The index is flat because `scatter_` walks all of `weights` on the CPU.
    """
    index = starts + columns
    weights.view(-1).index_copy_(0, index.flatten(), values.expand_as(index).flatten().to(weights.dtype))
