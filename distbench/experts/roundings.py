"""Where a family of kernels rounds, between the rows that it is given and those that it returns. Loads no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from distbench.architectures import Fp8Format
from distbench.case import Case
from distbench.experts.selection import KernelChoice

Stored = Literal["bf16", "e4m3"]
Scales = Literal["power of two", "maximum"]


class Roundings(msgspec.Struct, frozen=True, kw_only=True):
    """The roundings of one kernel; whatever is not named here is kept in float32, as all families accumulate over K.

    Each route's row is rounded to bf16 in every family there is, and so is the row that is returned.
    """

    weights: Literal["bf16"] | Fp8Format = "bf16"
    """bf16 as they were given, or e4m3 with a power of two for each 128 x 128, gate and up apart."""
    bf16_intermediate: bool = True
    """SiLU(gate) * up is rounded to bf16, before any other rounding of it."""
    intermediate: Literal["", "e4m3fn", "e4m3fnuz"] = ""
    """e4m3 in which the intermediate is stored, with a scale for each 128 of its columns; empty for none."""
    scales: Scales = "power of two"
    """The intermediate's: the least power of two that keeps a block within e4m3, or its maximum over e4m3's largest."""
    sums: Literal["float32", "bf16"] = "float32"
    """Routes of a row are added in float32 and rounded once, or one after another, in any order, into a bf16 row."""

    @property
    def name(self) -> str:
        """The family in a few words, as reports name the ideal."""
        weights = "bf16" if self.weights == "bf16" else f"{self.weights} 128x128"
        steps = ["bf16"] if self.bf16_intermediate else []
        steps += [f"{self.intermediate} 1x128"] if self.intermediate else []
        middle = ", then ".join(steps) or "float32"
        total = "one rounding of the sum" if self.sums == "float32" else "a rounding at each add"
        return f"{weights} weights, {middle} intermediate, bf16 routes, {total}"


def roundings_of(case: Case, choice: KernelChoice) -> Roundings:
    """Return where the kernel of `choice` rounds, by the experts of `case`.

    The Triton kernels and the reference: docs/triton.md, docs/semantics.md. aiter: its two stages store a bf16
    intermediate, which per_1x128 quantises by its maximum; one stage quantises what it has in float32
    (aiter v0.1.20, fused_moe_2stages and quant.py).
    """
    quantised: Literal["", "e4m3fn", "e4m3fnuz"] = case.fp8_format if case.dispatch_dtype == "fp8" else ""
    return Roundings(
        weights=quantised or "bf16",
        bf16_intermediate=not choice.run_1stage,
        intermediate=quantised,
        scales=scales_of(case),
        sums="bf16" if choice.stage2_mode == "atomic" else "float32",
    )


def scales_of(case: Case) -> Scales:
    """Return which scales the experts of `case` give an intermediate in e4m3."""
    return "maximum" if case.experts == "aiter" else "power of two"


def stored_intermediate(case: Case) -> Stored:
    """Return as what the experts of `case` hold the intermediate between their two products.

    A kernel of one stage keeps it in float32 where this says bf16.
    """
    return "e4m3" if case.dispatch_dtype == "fp8" else "bf16"
