"""Kinds of damage that the exact inputs of a shape cannot show, or show in few tokens only. Loads no torch."""

from __future__ import annotations

from collections.abc import Iterator

from distbench.workload.exact_plan import BLOCK, MAX_UNITS, ExactPlan, gate_reads, up_reads
from distbench.workload.probe_plan import ProbePlan
from distbench.workload.routing_spec import Slots

# Below this number of hidden columns there are few code columns and few probes.
_FEW_COLUMNS = 64
_MANY_WITHOUT_CODE = 0.01


def blind_spots(plan: ExactPlan, slots: Slots | None = None) -> list[str]:
    """Return a sentence for each kind of damage that the plan's inputs do not show; empty where there is none."""
    found = [*_of_sums(plan), *(_of_slots(slots) if slots else ())]
    if plan.probes is None:
        unseen = "the activation, the gate's columns, roundings and the scales of rows"
        return [f"the shape has no room for probes: {unseen} are not seen", *found]
    return [*_of_probes(plan, plan.probes), *found]


def _of_probes(plan: ExactPlan, probes: ProbePlan) -> Iterator[str]:
    if plan.hidden_size < _FEW_COLUMNS:
        yield f"hidden_size = {plan.hidden_size}: below {_FEW_COLUMNS} columns probes are few and may miss a fault"
    if probes.code.missing > _MANY_WITHOUT_CODE:
        share = f"{100 * probes.code.missing:.0f} %"
        yield f"{share} of tokens have no code among {probes.code.columns} columns: only sums see them"
    if probes.live_groups < probes.code.groups:
        groups = f"{probes.live_groups} of {probes.code.groups} groups of experts"
        yield f"{groups} have probes: only sums see the routes of the others"
    if not probes.up_rows or not probes.gate_rows:
        missing = "gate" if not probes.gate_rows else "up"
        yield f"no probe row has a payload in its {missing} values"
    elif plan.num_experts * gate_reads(plan) < plan.payload_columns:
        read = plan.num_experts * gate_reads(plan)
        yield f"the gates read {read} of {plan.payload_columns} hidden columns"
    wide = plan.num_experts * min(probes.wide_gate_rows, probes.wide_up_rows)
    if wide < plan.wide_columns:
        yield f"wide columns, of eight significant bits: {wide} of {plan.wide_columns} are read"
    if plan.combine == "fp8_blockwise" and not probes.hot_rows:
        yield "no block of the quantised combine is large enough to be scaled: its scales are not seen"


def _of_slots(slots: Slots) -> Iterator[str]:
    doubled = [rank for rank in range(slots.group.ep_size) if len(slots.held(rank)) < slots.routed_per_rank]
    if doubled:
        yield (
            f"{len(doubled)} of {slots.group.ep_size} ranks hold an expert in two slots, whose weights are alike: "
            "one slot taken for the other is not seen"
        )


def _of_sums(plan: ExactPlan) -> Iterator[str]:
    if plan.num_experts * up_reads(plan) < plan.payload_columns:
        read = plan.num_experts * up_reads(plan)
        yield f"the up projection's sums read {read} of {plan.payload_columns} hidden columns"
    if plan.formula.bias:
        count = plan.hidden_size - plan.sum_columns
        zeros = f"bias2 is 0 in {count} of {plan.hidden_size} columns"
        yield f"{zeros}, and biases are exact in bf16: their width is not seen"
    if not plan.weighs_unevenly:
        reason = "doweight_stage1 with fp8, a limit, swiglu or bias has no certain points for 1/2"
        yield f"all routing weights are 1: {reason}"
    elif plan.weight_ratio == 1:
        bound = f"sums stay within {plan.max_units} units"
        yield f"all routing weights are 1, because {bound} with topk = {plan.topk}: faults in weights are not seen"
    if plan.block_scaled and not plan.guard_rows:
        size = f"intermediate_size = {plan.intermediate_size}"
        yield f"{size} is no multiple of {BLOCK}: scales of weights and of a quantised intermediate are all alike"
    elif plan.guard_rows and not plan.guard_sums:
        yield f"no output reads the guard rows, because topk = {plan.topk} of them would pass {MAX_UNITS} units"
