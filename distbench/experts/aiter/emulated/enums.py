"""aiter's enums with the numbers of csrc/include/aiter_enum.h; in aiter they are pybind objects of the same names."""

from __future__ import annotations

from enum import Enum


class ActivationType(Enum):
    """Activation between the stages. Newer releases have more."""

    No = -1
    Silu = 0
    Gelu = 1
    Swiglu = 2


class QuantType(Enum):
    """Kind of scales of weights and activations."""

    No = 0
    per_Tensor = 1  # noqa: N815 - aiter's names
    per_Token = 2  # noqa: N815
    per_1x32 = 3
    per_1x128 = 4
    per_128x128 = 5
