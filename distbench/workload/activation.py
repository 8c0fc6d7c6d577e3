"""The activation between an expert's two products, in the dtype of its arguments."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from distbench.workload.formula import SWIGLU_ALPHA, Formula


def activate(gate: Tensor, up: Tensor, formula: Formula) -> Tensor:
    """Return the intermediate of gate and up, of shapes that broadcast."""
    if formula.limit:
        gate, up = gate.clamp(max=formula.limit), up.clamp(-formula.limit, formula.limit)
    if formula.activation == "swiglu":
        return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)
    return (functional.gelu(gate) if formula.activation == "gelu" else functional.silu(gate)) * up
