"""Experts over torch's grouped matrix product: two products, with gate and up rounded to bf16 in between."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from distbench.case.kinds import inputs_of
from distbench.case.plugins import Plugin
from distbench.case.spec import Case
from distbench.errors import Unsupported
from distbench.experts.base import ExpertInput, Experts, ExpertsContext, ExpertWeights
from distbench.experts.formulas import formula_of
from distbench.experts.reference import local_experts, local_rows
from distbench.experts.roundings import Roundings
from distbench.experts.selection.choice import KernelChoice
from distbench.workload.activation import activate

_ALIGNED = 8
"""Columns of a bf16 row of 16 bytes, which `grouped_mm` takes whole multiples of."""


class GroupedExperts(Experts):
    """Routes sorted by expert, `torch.nn.functional.grouped_mm` for both products, and their float32 sum.

    The number of live rows is read on the host, so no CUDA graph can capture a call.
    """

    def __init__(self, case: Case) -> None:
        """Take the formula of `case`.

        Raises:
            Unsupported: torch has no grouped product, or not of this layer's columns.
        """
        if not hasattr(functional, "grouped_mm"):
            message = f"experts torch-grouped: torch {torch.__version__} has no grouped_mm; it came with torch 2.10"
            raise Unsupported(message)
        for name in ("hidden_size", "intermediate_size"):
            size = getattr(case, name)
            if size % _ALIGNED:
                message = f"experts torch-grouped: {name} = {size}: grouped_mm takes multiples of {_ALIGNED} columns"
                raise Unsupported(message)
        if case.swiglu_limit and "exact" in inputs_of(case):
            message = (
                f"experts torch-grouped: swiglu_limit = {case.swiglu_limit:g}: they round gate and up to bf16 before "
                "the limit, for which exact inputs are not made; use numerics gaussian"
            )
            raise Unsupported(message)
        self._formula = formula_of(case)

    def selection(self, rows: int) -> KernelChoice:
        """See `Experts.selection`; the number of rows selects nothing here."""
        return KernelChoice.named(rows, "torch grouped_mm")

    def roundings(self, choice: KernelChoice) -> Roundings:  # noqa: ARG002 - it has one kernel
        """See `Experts.roundings`."""
        return Roundings(bf16_products=True, formula=self._formula)

    def about(self) -> dict[str, Any]:
        """See `Experts.about`."""
        return {"torch": {"version": str(torch.__version__)}}

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        """See `Experts.__call__`."""
        live, topk = min(int(given.num_local_tokens), given.rows), given.ids.shape[1]
        local = local_experts(given.ids[:live], local_rows(weights.mask)).flatten()
        here = (local >= 0).nonzero()[:, 0]
        routes = here[local[here].argsort(stable=True)]
        ends = torch.bincount(local[here], minlength=weights.w1.shape[0]).cumsum(0).int()
        made = given.hidden.new_zeros(live * topk, weights.w2.shape[1], dtype=torch.float32)
        if len(routes):
            share = given.weights[:live].flatten()[routes].unsqueeze(1)
            rows = given.hidden[routes.div(topk, rounding_mode="floor")]
            made[routes] = self._products(rows, share, local[routes], ends, weights)
        out = given.hidden.new_empty(given.rows, weights.w2.shape[1])
        out[:live] = made.view(live, topk, out.shape[1]).sum(1)
        return out

    def _products(self, rows: Tensor, share: Tensor, experts: Tensor, ends: Tensor, weights: ExpertWeights) -> Tensor:
        """Weighted expert rows float32 of routes sorted by expert; `ends` int32 [El] is where each expert's end."""
        first = functional.grouped_mm(rows, weights.w1.transpose(1, 2), offs=ends).float()
        if self._formula.weigh_first:
            first *= share
        if weights.bias1 is not None:
            first += weights.bias1[experts]
        gate, up = first.chunk(2, dim=1)
        middle = activate(gate, up, self._formula).bfloat16()
        second = functional.grouped_mm(middle, weights.w2.transpose(1, 2), offs=ends).float()
        if weights.bias2 is not None:
            second += weights.bias2[experts]
        return second if self._formula.weigh_first else second * share


def make(context: ExpertsContext) -> GroupedExperts:
    """Return the experts of a case."""
    return GroupedExperts(context.case)


PLUGIN = Plugin(make=make, name="torch-grouped", version=str(torch.__version__), dtypes=("bf16",))
