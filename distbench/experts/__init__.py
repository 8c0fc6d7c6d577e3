"""Implementations of a rank's experts, and the kernel that the row count selects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from distbench.case.plugins import Plugin, is_trusted, load_plugin, options_of
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
        topk=case.topk_slots,
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


def make_experts(case: Case, brought: Plugin | None = None) -> Experts:
    """Return the experts that the case asks for, or those of a plugin that its process has `brought`.

    Raises:
        Unsupported: the case's package is missing, or does not state what the case needs.
        InvalidCase: the package does not support the case, or an option of the plugin is wrong.
        BrokenContract: a plugin's factory raises, or returns no experts.
    """
    from distbench.experts.base import ExpertsContext  # noqa: PLC0415 - kernel choice alone needs no torch

    plugin = brought or load_plugin("experts", case.experts)
    if is_trusted("experts", case.experts):
        made: Experts = plugin.make(ExpertsContext(case))
        return made
    from distbench.case.contract import check_stated  # noqa: PLC0415 - only for plugins
    from distbench.experts.contract import CheckedExperts  # noqa: PLC0415 - only around plugins

    check_stated(plugin, "experts", case, "")
    context = ExpertsContext(case, options_of(plugin, "experts_option", case.experts_option))
    return CheckedExperts(context, plugin)
