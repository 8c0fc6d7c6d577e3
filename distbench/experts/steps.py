"""Arithmetic of the reference experts, one method per step: each is a point where a mutant substitutes its own."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distbench.experts.blocked_matmul import Weights, blocked_product
from distbench.experts.roundings import Scales
from distbench.experts.selection.choice import KernelChoice
from distbench.workload.activation import activate
from distbench.workload.formula import Formula
from distbench.workload.quantize import through_blocks


class Group(NamedTuple):
    """Routes of some experts, padded to one length.

    experts [g]: rows of the local weights. routes [g, m]: indices into the flat list of a call's `total` routes;
    `total` past an expert's last route. `run`: the experts as a slice where they are consecutive.
    """

    experts: Tensor
    routes: Tensor
    total: int
    run: slice | None


class Steps:
    """The steps of a kernel, in order. All values are float32 unless stated otherwise."""

    def __init__(self, formula: Formula = Formula()) -> None:  # noqa: B008 - frozen
        """Compute `formula` between the products."""
        self.formula = formula

    def widen(self, hidden: Tensor, scales: Tensor | None) -> Tensor:
        """Return hidden rows [n, H] as float32, block-scaled rows multiplied out; scales [n, H/128] or None."""
        if scales is None:
            return hidden.float()
        rows, columns = hidden.shape
        return (hidden.float().view(rows, scales.shape[1], -1) * scales.unsqueeze(2)).view(rows, columns)

    def first(self, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
        """Return gate and up of rows [g, m, H], concatenated: [g, m, 2I]."""
        return blocked_product(rows, w1, group.experts, choice.tile_k1, choice.ksplit)

    def bias(self, rows: Tensor, bias: Tensor, group: Group) -> Tensor:
        """Return a product's rows [g, m, N] with the bias [El, N] of their experts: of stage 1, then of stage 2."""
        return rows + bias.index_select(0, group.experts).unsqueeze(1)

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the intermediate [g, m, I], unrounded."""
        return activate(gate, up, self.formula)

    def store(self, intermediate: Tensor) -> Tensor:
        """Return the intermediate [g, m, I] as a two-stage kernel stores it."""
        return intermediate.bfloat16().float()

    def requantise(self, intermediate: Tensor, dtype: torch.dtype, scales: Scales) -> Tensor:
        """Return the intermediate [g, m, I] after a round trip through e4m3 `dtype`, with a scale per 128 columns."""
        return through_blocks(intermediate, dtype, power_of_two=scales == "power of two")

    def second(self, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
        """Return intermediate rows [g, m, I] times w2: [g, m, H]."""
        return blocked_product(rows, w2, group.experts, choice.tile_k2, 1)

    def weigh(self, rows: Tensor, weights: Tensor, group: Group) -> Tensor:  # noqa: ARG002 - mutants use it
        """Return a product's rows [g, m, N] times the routing weights [g, m] of their routes."""
        return rows * weights.unsqueeze(2)

    def round(self, routes: Tensor) -> Tensor:
        """Return the rows of routes [n, k, H] rounded to bf16 for the sum."""
        return routes.bfloat16()

    def add(self, routes: Tensor, sums: torch.dtype) -> Tensor:
        """Return the ordered sum of bf16 routes [n, k, H] over k, accumulated in `sums`' dtype, as bf16 [n, H]."""
        first, *others = routes.unbind(1)
        total = first.to(sums).add(0.0)  # a sum from +0.0 has no -0.0
        for route in others:
            total += route
        return total.bfloat16()
