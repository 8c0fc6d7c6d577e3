"""Mutants of memory that still holds data of an earlier step, row or batch."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from distbench.experts.base import ExpertInput
from distbench.experts.blocked_matmul import Weights
from distbench.experts.selection.choice import KernelChoice
from distbench.experts.steps import Group
from distbench.faults.mutants.corpus import Class, Site, earlier, live, rare
from distbench.transport.base import Dispatched, poison_

STALE = Class("stale memory")
_stale = STALE.at


@_stale("computed", bug="aiter 575: the output of expert parallelism is not zeroed")
def output_not_zeroed(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """Rows are added to those of an earlier batch."""
    count = live(given)
    rows[:count] += earlier(rows[:count])
    return rows


@_stale("first", bug="aiter 3997, 4394: block-fp8 split-k adds atomically to a buffer that was not zeroed")
def split_k_buffer_not_zeroed(site: Site, *operands: Any) -> Tensor:
    """Gate and up of each row are added to those of the row before it."""
    made = site.right(*operands)
    return made + made.roll(1, 1)


@_stale("second")
def accumulators_not_cleared(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Each expert's rows from 32 on are added to its first ones."""
    made = site.right(rows, w2, group, choice)
    second = made[:, 32:64].clone()
    made[:, 32:64] = second + made[:, : second.shape[1]]
    return made


@_stale("store")
def intermediate_of_the_expert_before(site: Site, intermediate: Tensor) -> Tensor:
    """Each expert's first 4 rows are the intermediate of the expert before it."""
    made = site.right(intermediate)
    made[1:, :4] = made[:-1, :4].clone()
    return made


@_stale("second")
def stage_2_reads_a_buffer_twice(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The second 64 of K are still the first: a double buffer was not swapped."""
    wrong = rows.clone()
    wrong[..., 64:128] = rows[..., :64]
    return site.right(wrong, w2, group, choice)


@_stale("received")
def received_rows_of_an_earlier_batch(site: Site, dispatched: Dispatched) -> Dispatched:
    """Each fourth received row still holds the payload of an earlier batch."""
    whole = dispatched.hidden.view(torch.uint8)[: int(dispatched.total_recv)]
    whole[::4] = earlier(whole)[::4]
    return dispatched


@_stale(
    "received",
    touches="row",
    bug="mori 80, 484: a rank that is a call ahead overwrites rows that a slow one has not read",
)
def one_received_row_stale(site: Site, dispatched: Dispatched) -> Dispatched:
    """One received row in 64 holds the payload of an earlier batch."""
    whole = dispatched.hidden.view(torch.uint8)[: int(dispatched.total_recv)]
    whole[rare(len(whole))] = earlier(whole)[rare(len(whole))]
    return dispatched


@_stale("received", touches="row")
def weights_of_one_received_row_stale(site: Site, dispatched: Dispatched) -> Dispatched:
    """One received row in 64 has the weights of an earlier batch."""
    weights = dispatched.weights[: int(dispatched.total_recv)]
    weights[rare(len(weights))] = earlier(weights)[rare(len(weights))]
    return dispatched


@_stale(
    "received", touches="row", bug="mori 617: a staging pool too small drops ids and weights while the payload is right"
)
def ids_of_one_received_row_poison(site: Site, dispatched: Dispatched) -> Dispatched:
    """The ids of one received row in 64 were not written."""
    ids = dispatched.ids[: int(dispatched.total_recv)]
    for row in rare(len(ids)).tolist():
        poison_(ids[row : row + 1])
    return dispatched


@_stale("computed", touches="row")
def one_row_not_written(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """One row in 64 holds the data of an earlier batch."""
    count = live(given)
    rows[rare(count)] = earlier(rows[:count])[rare(count)]
    return rows


@_stale("computed", touches="row", bug="aiter 3117: uninitialised lanes in a stage-2 kernel")
def one_row_not_initialised(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """One row in 64 is NaN."""
    rows[rare(live(given))] = float("nan")
    return rows


@_stale("computed", touches="elements")
def lanes_of_one_row_not_written(site: Site, given: ExpertInput, rows: Tensor) -> Tensor:
    """Eight columns of one row in 64 hold the data of an earlier batch."""
    count = live(given)
    rows[rare(count), 32:40] = earlier(rows[:count])[rare(count), 32:40]
    return rows


@_stale("returned", touches="row")
def one_returned_row_stale(site: Site, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Combine reads one row in 64 before it is written."""
    rows = rows.clone()
    rows[rare(len(rows))] = rows[(rare(len(rows)) - 1).clamp(min=0)]
    return rows, ids


@_stale("combined", touches="row")
def one_token_not_written(site: Site, tokens: Tensor) -> Tensor:
    """One token in 64 holds the result of an earlier batch."""
    tokens[rare(len(tokens))] = earlier(tokens)[rare(len(tokens))]
    return tokens


@_stale("store", touches="elements")
def a_column_of_the_row_before(site: Site, intermediate: Tensor) -> Tensor:
    """Intermediate column 128 is that of the row before."""
    made = site.right(intermediate)
    made[..., 128] = made[..., 128].roll(1, 1)
    return made


@_stale(
    "combined",
    unseen="in truncated alone no pass is before it; where all arms have it, no two in a row send the same tokens",
)
def tokens_of_the_last_pass(site: Site, tokens: Tensor) -> Tensor:
    """The first token is that of the pass before, with the same tokens."""
    last = site.kept.get("tokens")
    site.kept["tokens"] = tokens.clone()
    if last is not None and len(tokens):
        tokens[0] = last[0]
    return tokens
