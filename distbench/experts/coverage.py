"""Blind spots of a case's exact inputs with its experts. Loads no torch."""

from __future__ import annotations

from distbench.case.spec import Case
from distbench.experts.formulas import formula_of
from distbench.experts.roundings import stored_intermediate
from distbench.workload.blind_spots import blind_spots
from distbench.workload.exact_plan import ExactPlan, plan_exact
from distbench.workload.routing_spec import slots_of


def plan_of(case: Case) -> ExactPlan:
    """Return the plan of a case's exact inputs.

    Raises:
        InvalidCase: the shape cannot be exact; the message names the bound.

    """
    return plan_exact(
        case.hidden_size - case.hidden_pad,
        case.intermediate_size - case.intermediate_pad,
        case.topk_slots,
        case.dispatch_dtype,
        case.num_experts + case.shared_experts,
        case.combine_quant,
        case.fp8_format,
        stored_intermediate(case),
        formula_of(case),
    )


def blind_spots_of(case: Case) -> list[str]:
    """Return a sentence for each kind of damage that the case's exact inputs cannot show; empty for gaussian inputs.

    Raises:
        InvalidCase: see `plan_of`.
    """
    return blind_spots(plan_of(case), slots_of(case)) if case.numerics != "gaussian" else []
