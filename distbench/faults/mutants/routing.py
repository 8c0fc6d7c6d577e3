"""Mutants of routing weights and of expert ids."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from distbench.experts.base import ExpertInput
from distbench.experts.blocked_matmul import Weights
from distbench.experts.selection.choice import KernelChoice
from distbench.experts.steps import Group
from distbench.faults.mutants.corpus import Class, Site, by_next_expert, live, rare
from distbench.transport.base import Dispatched
from distbench.workload.batch import TokenBatch

WEIGHTS = Class("weights", "bf16", "cast")
IDS = Class("ids")
_weight, _id = WEIGHTS.at, IDS.at


@_weight("weigh")
def weights_ignored(site: Site, rows: Tensor, weights: Tensor, group: Group) -> Tensor:
    """Routing weights are read as 1."""
    return rows


@_weight("weigh")
def weights_squared(site: Site, rows: Tensor, weights: Tensor, group: Group) -> Tensor:
    """Routing weights are applied twice."""
    return site.right(rows, weights * weights, group)


@_weight("weigh", "bf16")
def weights_in_bf16(site: Site, rows: Tensor, weights: Tensor, group: Group) -> Tensor:
    """Routing weights are rounded to bf16."""
    return site.right(rows, weights.bfloat16().float(), group)


@_weight("asked")
def weights_rotated(site: Site, given: ExpertInput) -> ExpertInput:
    """Each slot has the weight of the slot before it."""
    return given._replace(weights=given.weights.roll(1, 1))


@_weight("asked")
def weights_of_the_row_before(site: Site, given: ExpertInput) -> ExpertInput:
    """Each row has the weights of the row before it."""
    weights = given.weights.clone()
    weights[: live(given)] = weights[: live(given)].roll(1, 0)
    return given._replace(weights=weights)


@_weight("asked")
def weight_of_slot_0_for_all(site: Site, given: ExpertInput) -> ExpertInput:
    """All slots have the weight of the first."""
    return given._replace(weights=given.weights[:, :1].expand_as(given.weights).contiguous())


@_weight("asked")
def weights_sorted(site: Site, given: ExpertInput) -> ExpertInput:
    """Weights are sorted, ids are not."""
    return given._replace(weights=given.weights.sort(1, descending=True)[0])


@_weight("asked")
def weights_normalised(site: Site, given: ExpertInput) -> ExpertInput:
    """The kernel divides a row's weights by their sum."""
    return given._replace(weights=given.weights / given.weights.sum(1, keepdim=True))


@_weight("asked")
def last_weight_lost(site: Site, given: ExpertInput) -> ExpertInput:
    """The weight of the last slot is 0."""
    weights = given.weights.clone()
    weights[:, -1] = 0
    return given._replace(weights=weights)


def _weighted_gate(site: Site, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
    made = site.right(rows, w1, group, choice)
    half = made.shape[2] // 2
    weights = functional.pad(site.kept["weights"].flatten()[: group.total], (0, 1))
    made[..., :half] *= weights[group.routes].unsqueeze(2)
    return made


def _unweighted(site: Site, rows: Tensor, weights: Tensor, group: Group) -> Tensor:
    return rows


@_weight("asked", "bf16", also={"first": _weighted_gate, "weigh": _unweighted})
def weights_on_the_gate(site: Site, given: ExpertInput) -> ExpertInput:
    """Routing weights multiply the gate, before silu."""
    site.kept["weights"] = given.weights
    return given


@_weight("received")
def weights_delivered_to_the_next_row(site: Site, dispatched: Dispatched) -> Dispatched:
    """The transport delivers each row with the weights of the row before it."""
    count = int(dispatched.total_recv)
    dispatched.weights[:count] = dispatched.weights[:count].roll(1, 0)
    return dispatched


@_weight("sent", "bf16")
def weights_sent_in_bf16(site: Site, batch: TokenBatch) -> TokenBatch:
    """Routing weights are rounded to bf16 before they are sent."""
    return batch._replace(weights=batch.weights.bfloat16().float())


@_weight("asked", touches="row")
def weights_of_one_row_are_its_neighbours(site: Site, given: ExpertInput) -> ExpertInput:
    """One row in 64 has the weights of the row before it."""
    weights, wrong = given.weights.clone(), rare(live(given))
    weights[wrong] = weights[(wrong - 1).clamp(min=0)]
    return given._replace(weights=weights)


@_weight("asked", touches="row")
def weights_of_one_row_ignored(site: Site, given: ExpertInput) -> ExpertInput:
    """The weights of one row in 64 are read as 1."""
    weights = given.weights.clone()
    weights[rare(live(given))] = 1
    return given._replace(weights=weights)


@_weight("asked", touches="row")
def two_weights_of_one_row_swapped(site: Site, given: ExpertInput) -> ExpertInput:
    """The first two weights of one row in 64 are exchanged."""
    weights, wrong = given.weights.clone(), rare(live(given))
    weights[wrong, :2] = weights[wrong, :2].flip(1)
    return given._replace(weights=weights)


@_weight("weigh", touches="elements")
def four_columns_unweighted(site: Site, rows: Tensor, weights: Tensor, group: Group) -> Tensor:
    """Columns 4 to 7 are not multiplied by the routing weight."""
    made = site.right(rows, weights, group)
    made[..., 4:8] = rows[..., 4:8]
    return made


@_weight("asked", equivalent="no expert of this rank uses the weight of another rank's expert")
def foreign_weights_zeroed(site: Site, given: ExpertInput) -> ExpertInput:
    """Weights of experts of other ranks are set to 0."""
    return given._replace(weights=torch.where(site.local(given.ids), given.weights, 0.0))


def _shifted(site: Site, ids: Tensor, by: int) -> Tensor:
    count = site.case.experts_per_rank
    moved = site.first_expert + (ids - site.first_expert + by) % count
    return torch.where(site.local(ids), moved, ids).to(torch.int32)


@_id("asked")
def next_expert(site: Site, given: ExpertInput) -> ExpertInput:
    """Each local id is read as the next local expert."""
    return given._replace(ids=_shifted(site, given.ids, 1))


@_id("asked", bug="vllm PR 29773: fused_moe takes a binary mask where an index map was passed, or the reverse")
def mask_read_as_map(site: Site, given: ExpertInput) -> ExpertInput:
    """All local ids are read as the second local expert."""
    return given._replace(ids=torch.where(site.local(given.ids), site.first_expert + 1, given.ids).to(torch.int32))


@_id("asked")
def first_two_experts_swapped(site: Site, given: ExpertInput) -> ExpertInput:
    """The first two local experts are exchanged."""
    low = site.local(given.ids) & (given.ids < site.first_expert + 2)
    return given._replace(ids=torch.where(low, 2 * site.first_expert + 1 - given.ids, given.ids).to(torch.int32))


@_id("asked")
def last_local_expert_lost(site: Site, given: ExpertInput) -> ExpertInput:
    """The last local expert is treated as another rank's: a bound off by one."""
    last = site.first_expert + site.case.experts_per_rank - 1
    return given._replace(ids=given.ids.masked_fill(given.ids == last, -1))


@_id("asked")
def first_local_expert_lost(site: Site, given: ExpertInput) -> ExpertInput:
    """The first local expert is treated as another rank's."""
    return given._replace(ids=given.ids.masked_fill(given.ids == site.first_expert, -1))


@_id("asked")
def expert_0_skipped(site: Site, given: ExpertInput) -> ExpertInput:
    """Global expert 0 is treated as no expert."""
    return given._replace(ids=given.ids.masked_fill(given.ids == 0, -1))


@_id("asked")
def mask_ignored(site: Site, given: ExpertInput) -> ExpertInput:
    """Experts of other ranks are computed too, with local weights."""
    ids = site.first_expert + given.ids % site.case.experts_per_rank
    return given._replace(ids=torch.where(given.ids < site.case.placed_experts, ids, given.ids).to(torch.int32))


@_id("asked")
def ids_rotated(site: Site, given: ExpertInput) -> ExpertInput:
    """Each slot has the id of the slot before it; weights stay."""
    return given._replace(ids=given.ids.roll(1, 1))


@_id("asked", bug="aiter 5595, 3377: the tuned row is looked up with top-k - 1")
def last_slot_left_out(site: Site, given: ExpertInput) -> ExpertInput:
    """The last slot is not computed."""
    ids = given.ids.clone()
    ids[:, -1] = -1
    return given._replace(ids=ids)


@_id("asked")
def first_slot_for_the_last(site: Site, given: ExpertInput) -> ExpertInput:
    """The last slot's expert is the first slot's again."""
    ids = given.ids.clone()
    ids[:, -1] = ids[:, 0]
    return given._replace(ids=ids)


@_id("second")
def w2_of_the_next_expert(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Stage 2 uses the next expert's weights."""
    return by_next_expert(site, rows, w2, group, choice)


@_id("first")
def up_of_the_next_expert(site: Site, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Up uses the next expert's weights, the gate its own."""
    made = site.right(rows, w1, group, choice)
    half = made.shape[2] // 2
    made[..., half:] = by_next_expert(site, rows, w1, group, choice)[..., half:]
    return made


@_id("received")
def ids_delivered_to_the_next_row(site: Site, dispatched: Dispatched) -> Dispatched:
    """The transport delivers each row with the ids of the row before it."""
    count = int(dispatched.total_recv)
    dispatched.ids[:count] = dispatched.ids[:count].roll(1, 0)
    return dispatched


@_id("asked", touches="row")
def next_expert_in_one_row(site: Site, given: ExpertInput) -> ExpertInput:
    """The ids of one row in 64 are read as the next local expert's."""
    ids, wrong = given.ids.clone(), rare(live(given))
    ids[wrong] = _shifted(site, ids[wrong], 1)
    return given._replace(ids=ids)


@_id("asked", touches="row")
def ids_of_one_row_lost(site: Site, given: ExpertInput) -> ExpertInput:
    """One row in 64 has no experts."""
    ids = given.ids.clone()
    ids[rare(live(given))] = -1
    return given._replace(ids=ids)


@_id("asked", touches="row")
def ids_of_one_row_are_its_neighbours(site: Site, given: ExpertInput) -> ExpertInput:
    """One row in 64 has the ids of the row before it."""
    ids, wrong = given.ids.clone(), rare(live(given))
    ids[wrong] = ids[(wrong - 1).clamp(min=0)]
    return given._replace(ids=ids)


@_id("second", touches="row")
def w2_of_the_next_expert_in_one_row(
    site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice
) -> Tensor:
    """Stage 2 uses the next expert's weights for one row in 64."""
    wrong = by_next_expert(site, rows, w2, group, choice)
    return torch.where(site.rare_in(group), wrong, site.right(rows, w2, group, choice))


@_id("asked", equivalent="an id of another rank's expert and -1 both mean that this rank adds nothing")
def foreign_ids_are_minus_1(site: Site, given: ExpertInput) -> ExpertInput:
    """Ids of experts of other ranks are replaced by -1."""
    return given._replace(ids=torch.where(site.local(given.ids), given.ids, -1).to(torch.int32))
