"""Mutants of dispatch, of the cut and of combine."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from distbench.experts.base import ExpertInput
from distbench.faults.mutants.corpus import Class, Site, earlier, rare
from distbench.transport.base import Dispatched
from distbench.workload.batch import TokenBatch

DISPATCH = Class("dispatch")
CUT = Class("cut")
COMBINE = Class("combine")
_dispatch, _cut, _combine = DISPATCH.at, CUT.at, COMBINE.at


@_dispatch("received")
def payload_of_the_row_before(site: Site, dispatched: Dispatched) -> Dispatched:
    """Each row arrives with the payload of the row before it."""
    whole = dispatched.hidden.view(torch.uint8)[: int(dispatched.total_recv)]
    whole.copy_(whole.roll(1, 0))
    return dispatched


@_dispatch("sent")
def payload_of_the_next_token(site: Site, batch: TokenBatch) -> TokenBatch:
    """Each token is sent with the payload of the next."""
    return batch._replace(hidden=batch.hidden.view(torch.uint8).roll(-1, 0).view(batch.hidden.dtype))


@_dispatch("received")
def last_columns_not_sent(site: Site, dispatched: Dispatched) -> Dispatched:
    """The last 64 columns of each row arrive as zeros."""
    dispatched.hidden[: int(dispatched.total_recv), -64:] = 0
    return dispatched


@_dispatch("sent")
def low_bit_cleared(site: Site, batch: TokenBatch) -> TokenBatch:
    """The lowest bit of each bf16 value is 0."""
    hidden = batch.hidden.clone()
    hidden.view(torch.int16)[:] &= -2
    return batch._replace(hidden=hidden)


@_dispatch("received")
def words_swapped(site: Site, dispatched: Dispatched) -> Dispatched:
    """The columns of a row are exchanged in pairs."""
    rows = dispatched.hidden[: int(dispatched.total_recv)]
    rows.copy_(rows.unflatten(1, (-1, 2)).flip(2).flatten(1))
    return dispatched


@_dispatch("received")
def sign_lost(site: Site, dispatched: Dispatched) -> Dispatched:
    """Column 5 and every 16th after it arrive without their sign."""
    rows = dispatched.hidden[: int(dispatched.total_recv), 5::16]
    rows.copy_(rows.abs())
    return dispatched


@_dispatch("received", touches="elements")
def last_8_bytes_not_sent(site: Site, dispatched: Dispatched) -> Dispatched:
    """The last 4 columns of each row arrive as zeros."""
    dispatched.hidden[: int(dispatched.total_recv), -4:] = 0
    return dispatched


@_dispatch("received", touches="row", bug="mori 475, 610: single tokens are corrupted")
def one_row_of_another_token(site: Site, dispatched: Dispatched) -> Dispatched:
    """One row in 64 arrives with the payload of another token."""
    rows = dispatched.hidden[: int(dispatched.total_recv)]
    rows[rare(len(rows))] = earlier(rows)[rare(len(rows))]
    return dispatched


@_dispatch("received", touches="elements", bug="mori 610: residual corruption of single tokens")
def one_sign_flipped(site: Site, dispatched: Dispatched) -> Dispatched:
    """Column 300 of one row in 64 arrives with the wrong sign."""
    rows = dispatched.hidden[: int(dispatched.total_recv)].view(torch.int16)
    rows[rare(len(rows)), 300] ^= -0x8000
    return dispatched


@_dispatch(
    "received", touches="row", bug="mori 617: a staging pool too small drops ids and weights while the payload is right"
)
def weights_of_one_row_lost(site: Site, dispatched: Dispatched) -> Dispatched:
    """The weights of one row in 64 arrive as zeros."""
    dispatched.weights[rare(int(dispatched.total_recv))] = 0
    return dispatched


@_dispatch(
    "received", touches="row", bug="mori 507, 621: tokens are dropped or doubled where rdma_block_num % 8 is not 0"
)
def one_row_doubled(site: Site, dispatched: Dispatched) -> Dispatched:
    """One row in 64 arrives twice, the second time instead of another row."""
    wrong = rare(int(dispatched.total_recv))
    for part in dispatched.fields():
        part.view(torch.uint8)[wrong] = part.view(torch.uint8)[(wrong - 1).clamp(min=0)]
    return dispatched


@_dispatch("received", touches="row")
def last_slot_of_one_row_lost(site: Site, dispatched: Dispatched) -> Dispatched:
    """The last slot of one row in 64 arrives as if no expert had been chosen there."""
    dispatched.ids[rare(int(dispatched.total_recv)), -1] = -1
    return dispatched


@_dispatch("received", equivalent="no consumer reads rows past total_recv")
def tail_overwritten(site: Site, dispatched: Dispatched) -> Dispatched:
    """Rows past total_recv hold ones."""
    dispatched.hidden[int(dispatched.total_recv) :] = 1.0
    return dispatched


def _each(given: ExpertInput, change: Callable[[Tensor], Tensor]) -> ExpertInput:
    """Return the input with the same change to all fields of rows."""
    hidden, scales, weights, ids, count = given
    return ExpertInput(change(hidden), None if scales is None else change(scales), change(weights), change(ids), count)


@_cut("cut")
def half_of_the_rows_cut_off(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """The cut keeps half of the received rows."""
    kept = max(int(dispatched.total_recv) // 2, 1)
    return _each(given, lambda part: part[:kept])


@_cut("cut")
def window_shifted(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """The cut begins at row 1."""
    return _each(given, lambda part: part.view(torch.uint8).roll(-1, 0).view(part.dtype))


@_cut("cut")
def hidden_from_row_1(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """The cut takes hidden from row 1 on, the other fields from row 0."""
    hidden = given.hidden.view(torch.uint8).roll(-1, 0).view(given.hidden.dtype)
    return given._replace(hidden=hidden)


@_cut("cut")
def weights_from_row_1(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """The cut takes weights from row 1 on, the other fields from row 0."""
    return given._replace(weights=given.weights.roll(-1, 0))


@_cut("cut")
def ids_from_row_1(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """The cut takes ids from row 1 on, the other fields from row 0."""
    return given._replace(ids=given.ids.roll(-1, 0))


@_cut("cut", bug="vllm PR 53261: per-expert counts are passed as the live-row count")
def live_count_of_an_expert(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """num_local_tokens is the number of rows of the first local expert."""
    count = (given.ids[: int(dispatched.total_recv)] == site.first_expert).sum()
    return given._replace(num_local_tokens=count.to(torch.int32).view(1))


@_cut("cut")
def tail_counts_as_live(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """num_local_tokens is one more than the number of received rows."""
    return given._replace(num_local_tokens=given.num_local_tokens + 1)


@_cut("cut", touches="row", bug="mori 165: total_recv read at the wrong time is not the number received")
def live_count_short(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """num_local_tokens is one less than the number of received rows."""
    return given._replace(num_local_tokens=given.num_local_tokens - 1)


@_cut("cut", touches="row")
def last_row_from_the_first(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """The last received row is a copy of the first."""
    hidden = given.hidden.clone()
    last = min(int(dispatched.total_recv), given.rows) - 1
    if last > 0:
        hidden.view(torch.uint8)[last] = hidden.view(torch.uint8)[0]
    return given._replace(hidden=hidden)


@_cut("cut", touches="elements")
def last_columns_cut_off(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """The last 4 columns of each row are zero after the cut."""
    hidden = given.hidden.clone()
    hidden[: int(dispatched.total_recv), -4:] = 0
    return given._replace(hidden=hidden)


@_cut("cut", touches="row")
def one_row_copied_late(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """One row in 64 is copied before it has arrived, and holds another token's payload."""
    hidden = given.hidden.clone()
    whole = hidden.view(torch.uint8)[: min(int(dispatched.total_recv), given.rows)]
    whole[rare(len(whole))] = earlier(whole)[rare(len(whole))]
    return given._replace(hidden=hidden)


@_cut("cut", touches="row")
def weights_of_one_row_not_copied(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """The weights of one row in 64 are zero after the cut."""
    weights = given.weights.clone()
    weights[rare(min(int(dispatched.total_recv), given.rows))] = 0
    return given._replace(weights=weights)


@_cut("cut", "bf16", "fp8", equivalent="a copy holds the same bits as a view")
def cut_is_a_copy(site: Site, dispatched: Dispatched, given: ExpertInput) -> ExpertInput:
    """The cut copies rows where production takes a view."""
    return _each(given, Tensor.clone)


@_combine("sum")
def first_contribution_twice(site: Site, rows: Tensor, out: Tensor) -> None:
    """The first rank's row of each token is added twice."""
    site.right(torch.cat([rows, rows[:, :1]], dim=1), out)


@_combine("sum")
def last_contribution_lost(site: Site, rows: Tensor, out: Tensor) -> None:
    """The last rank's row of each token is not added."""
    site.right(rows[:, :-1], out)


@_combine("sum")
def first_contribution_lost(site: Site, rows: Tensor, out: Tensor) -> None:
    """The first rank's row of each token is not added."""
    site.right(rows[:, 1:], out)


@_combine("sum")
def largest_for_sum(site: Site, rows: Tensor, out: Tensor) -> None:
    """The largest of the ranks' rows replaces their sum."""
    out.copy_(rows.amax(1))


@_combine("combined", "bf16", "cast")
def mean_for_sum(site: Site, tokens: Tensor) -> Tensor:
    """Sums are divided by the number of ranks."""
    return tokens / site.case.ep_size


@_combine("sum")
def sum_truncated(site: Site, rows: Tensor, out: Tensor) -> None:
    """The sum is truncated to bf16."""
    total = rows.float().sum(1)
    out.copy_((total.view(torch.int32) & -0x10000).view(torch.float32))


@_combine("sum")
def contributions_rounded_to_e4m3(site: Site, rows: Tensor, out: Tensor) -> None:
    """Each rank's row is rounded to e4m3 before it is added."""
    site.right(rows.float().clamp(-448, 448).to(torch.float8_e4m3fn).to(rows.dtype), out)


@_combine("returned", "cast")
def returned_rows_in_e5m2(site: Site, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Rows are cast to e5m2 on the trip back, where e4m3 was required."""
    return rows.to(torch.float8_e5m2).to(rows.dtype), ids


def _blocks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return rows in 8 blocks [n, 8, H/8], as the stand-in's blocks may be, and whether each must be scaled."""
    blocks = rows.float().unflatten(1, (8, -1))
    return blocks, (blocks.abs().amax(2, keepdim=True) / 448).clamp(min=1)


@_combine("returned", "blockwise")
def block_scales_lost(site: Site, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks that were scaled down to fp8 are not scaled up again."""
    blocks, scales = _blocks(rows)
    return (blocks / scales).flatten(1).to(rows.dtype), ids


@_combine("returned", "blockwise")
def block_scales_of_the_next_block(site: Site, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Blocks that were scaled down are scaled up by the next block's scale."""
    blocks, scales = _blocks(rows)
    return (blocks / scales * scales.roll(-1, 1)).flatten(1).to(rows.dtype), ids


@_combine("combined", "bf16", "blockwise", touches="elements")
def last_columns_lost(site: Site, tokens: Tensor) -> Tensor:
    """The last 4 columns of each token are zero."""
    tokens[:, -4:] = 0
    return tokens


@_combine("combined", "bf16", "cast", touches="row", bug="mori 475: 0.5 to 2 % of tokens are wrong")
def one_token_lost(site: Site, tokens: Tensor) -> Tensor:
    """One token in 64 is zero."""
    tokens[rare(len(tokens))] = 0
    return tokens


@_combine("sum", touches="row")
def one_contribution_lost(site: Site, rows: Tensor, out: Tensor) -> None:
    """One token in 64 lacks the last rank's row."""
    rows[rare(len(rows)), -1] = 0
    site.right(rows, out)


@_combine("sum", touches="row")
def one_contribution_twice(site: Site, rows: Tensor, out: Tensor) -> None:
    """One token in 64 has the first rank's row twice."""
    rows[rare(len(rows)), 0] *= 2
    site.right(rows, out)


@_combine("returned", "bf16", "cast", touches="row")
def last_returned_row_lost(site: Site, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The first returned row is zero."""
    rows = rows.clone()
    rows[:1] = 0
    return rows, ids


@_combine("combined", touches="elements")
def one_sign_lost(site: Site, tokens: Tensor) -> Tensor:
    """Column 1 of one token in 64 has lost its sign."""
    wrong = rare(len(tokens))
    tokens[wrong, 1:3] = tokens[wrong, 1:3].abs()
    return tokens


@_combine("combined", touches="elements")
def one_low_bit_flipped(site: Site, tokens: Tensor) -> Tensor:
    """The lowest bit of column 99 is wrong in one token in 64."""
    tokens.view(torch.int16)[rare(len(tokens)), 99] ^= 1
    return tokens


@_combine("sum", equivalent="a sum of at most two bf16 rows is rounded once, at any internal precision")
def two_rows_added_in_float64(site: Site, rows: Tensor, out: Tensor) -> None:
    """Ranks' rows are added in float64."""
    out.copy_(rows.double().sum(1).float())
