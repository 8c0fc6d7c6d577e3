"""Arithmetic of an expert around its two products, as `aiter.fused_moe` defines it. Loads no torch.

Sources: `torch_moe_stage1`, `torch_moe_stage2` and `swiglu` of aiter's fused_moe.py (0.1.7.post2.dev18; the limit on
other activations than swiglu 0.1.20), which are its own references.
"""

from __future__ import annotations

from typing import Literal

import msgspec

Activation = Literal["silu", "gelu", "swiglu"]

SWIGLU_ALPHA = 1.702
SWIGLU_LIMIT = 7.0
"""gpt-oss's numbers, which aiter has built in: gate * sigmoid(alpha * gate) * (up + 1), clamped at the limit."""


class Formula(msgspec.Struct, frozen=True, kw_only=True):
    """What is computed from gate and up, and where routing weights enter.

    `weigh_first` multiplies gate and up by the routing weight, and not the second product (doweight_stage1). With
    `bias` float32 numbers are added to gate and up after that, and to the second product before its weight.
    """

    activation: Activation = "silu"
    swiglu_limit: float = 0.0
    """0: none given, which is SWIGLU_LIMIT for swiglu."""
    weigh_first: bool = False
    bias: bool = False

    @property
    def limit(self) -> float:
        """Upper bound of the gate, and bound of up's magnitude; 0 for none."""
        return self.swiglu_limit or (SWIGLU_LIMIT if self.activation == "swiglu" else 0.0)

    @property
    def up_shift(self) -> int:
        """What the activation adds to up: 1 for swiglu."""
        return 1 if self.activation == "swiglu" else 0
