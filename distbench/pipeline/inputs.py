"""Inputs of a case on one rank, made as its experts round."""

from __future__ import annotations

import torch

from distbench.case.kinds import inputs_of
from distbench.case.spec import Case
from distbench.experts.formulas import formula_of
from distbench.experts.roundings import stored_intermediate
from distbench.workload.inputs import Workload, make_workload
from distbench.workload.routing_spec import slots_of


def workload_for(case: Case, device: torch.device) -> Workload:
    """Inputs of the case; the exact ones where a case runs with both kinds.

    Raises:
        InvalidCase: the routing does not fit the ranks, or the shape cannot be exact.

    """
    return make_workload(
        numerics=inputs_of(case)[0],
        hidden_size=case.hidden_size,
        intermediate_size=case.intermediate_size,
        num_experts=case.num_experts,
        topk=case.topk,
        ep_size=case.ep_size,
        seed=case.seed,
        routing=case.routing,
        tokens_per_rank=case.tokens,
        dispatch_dtype=case.dispatch_dtype,
        fp8_format=case.fp8_format,
        combine_quant=case.combine_quant,
        intermediate=stored_intermediate(case),
        formula=formula_of(case),
        hidden_pad=case.hidden_pad,
        intermediate_pad=case.intermediate_pad,
        shared_experts=case.shared_experts,
        placement=slots_of(case).experts,
        replica_choice=case.replica_choice,
        dropped_slots=case.dropped_slots,
        dropped_tokens=case.dropped_tokens,
        device=device,
    )
