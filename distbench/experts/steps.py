"""The arithmetic of the reference experts, one method a step: the seams at which a mutant replaces one."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from distbench.experts.products import Weights, blocked_product
from distbench.experts.roundings import Scales
from distbench.experts.selection import KernelChoice
from distbench.workload.quantize import through_blocks


class Group(NamedTuple):
    """Routes of some experts, padded to one length.

    experts [g]: rows of the local weights. routes [g, m]: numbers in the flat list of a call's `total` routes, and past
    an expert's last one `total`.
    """

    experts: Tensor
    routes: Tensor
    total: int


class Steps:
    """The steps of a kernel, in their order. All values are float32 unless said otherwise."""

    def widen(self, hidden: Tensor, scales: Tensor | None) -> Tensor:
        """Return hidden rows [n, H] as float32, block-scaled rows multiplied out; scales [n, H/128] or None."""
        if scales is None:
            return hidden.float()
        rows, columns = hidden.shape
        return (hidden.float().view(rows, scales.shape[1], -1) * scales.unsqueeze(2)).view(rows, columns)

    def first(self, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
        """Return gate and up of rows [g, m, H], beside each other: [g, m, 2I]."""
        return blocked_product(rows, w1, group.experts, choice.tile_k1, choice.ksplit)

    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        """Return the intermediate [g, m, I], unrounded."""
        return functional.silu(gate) * up

    def store(self, intermediate: Tensor) -> Tensor:
        """Return the intermediate [g, m, I] as a kernel of two stages stores it in between."""
        return intermediate.bfloat16().float()

    def requantise(self, intermediate: Tensor, dtype: torch.dtype, scales: Scales) -> Tensor:
        """Return what e4m3 `dtype` leaves of the intermediate [g, m, I], with a scale for each 128 of its columns."""
        return through_blocks(intermediate, dtype, power_of_two=scales == "power of two")

    def second(self, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
        """Return intermediate rows [g, m, I] times w2: [g, m, H]."""
        return blocked_product(rows, w2, group.experts, choice.tile_k2, 1)

    def weigh(self, rows: Tensor, weights: Tensor, group: Group) -> Tensor:  # noqa: ARG002 - a mutant's
        """Return rows [g, m, H] times the routing weights [g, m] of their routes."""
        return rows * weights.unsqueeze(2)

    def round(self, routes: Tensor) -> Tensor:
        """Return the rows of routes [n, k, H] as bf16, as they are added up."""
        return routes.bfloat16()

    def add(self, routes: Tensor, sums: torch.dtype) -> Tensor:
        """Return the sum of bf16 routes [n, k, H] over k, in order, kept in `sums` and rounded to bf16 [n, H]."""
        total = torch.zeros_like(routes[:, 0], dtype=sums)
        for route in routes.unbind(1):
            total += route
        return total.bfloat16()


STEPS = Steps()
"""The right ones."""
