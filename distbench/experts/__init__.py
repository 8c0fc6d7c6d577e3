"""Implementations of a rank's experts, and the kernel that the row count selects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distbench.case.spec import Case
from distbench.experts.selection.choice import (
    CURRENT,
    KernelSelector,
    LayerKey,
    Overrides,
    TunedKey,
    load_tuned_rows,
    rules_for,
)

if TYPE_CHECKING:
    from distbench.experts.base import Experts


def make_selector(case: Case) -> KernelSelector:
    """Return aiter's kernel choice for the case's layer on one rank.

    Raises:
        InvalidCase: the kernel table cannot be read, or the aiter version is unknown.
    """
    rules = rules_for(case.aiter_version) if case.aiter_version else CURRENT
    layer = LayerKey(
        num_local_experts=case.experts_per_rank,
        topk=case.topk,
        model_dim=case.hidden_size,
        inter_dim=case.intermediate_size,
        quant=case.dispatch_dtype,
        activation=case.activation,
        doweight_stage1=case.doweight_stage1,
        cu_count=case.cu_count,
    )
    tuned = load_tuned_rows(case.kernel_table, TunedKey.for_layer(layer, rules)) if case.kernel_table else ()
    return KernelSelector(layer=layer, tuned=tuned, rules=rules, overrides=overrides_of(case))


def overrides_of(case: Case) -> Overrides:
    """The case's values of the variables that change aiter's choice."""
    return Overrides(ksplit=case.aiter_ksplit, bypass_tuned=case.aiter_bypass_tune)


def make_experts(case: Case) -> Experts:
    """Return the experts that the case asks for."""
    if case.experts == "triton":
        from distbench.experts.triton.adapter import make_triton_experts  # noqa: PLC0415 - needs Triton and a GPU

        return make_triton_experts(case)
    if case.experts == "aiter":
        from distbench.experts.aiter.adapter import make_aiter_experts  # noqa: PLC0415 - each rank pays for imports

        return make_aiter_experts(case)
    from distbench.experts.formulas import formula_of  # noqa: PLC0415 - kernel choice alone needs none
    from distbench.experts.reference import ReferenceExperts  # noqa: PLC0415 - kernel choice alone needs no torch

    return ReferenceExperts(make_selector(case), case.seed, formula=formula_of(case))
