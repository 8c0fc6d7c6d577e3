"""Rounding points of a kernel family, between its input rows and its output rows. Loads no torch."""

from __future__ import annotations

from typing import Literal

import msgspec

from distbench.case.spec import Case
from distbench.experts.formulas import formula_of
from distbench.experts.selection.choice import KernelChoice
from distbench.utils.amd_arch import Fp8Format
from distbench.workload.formula import Formula

Stored = Literal["bf16", "e4m3"]
Scales = Literal["power of two", "maximum"]


class Roundings(msgspec.Struct, frozen=True, kw_only=True):
    """Roundings of one kernel; all other values stay in float32, as all families accumulate over K.

    Every family rounds each route's row to bf16, and the returned row as well.
    """

    weights: Literal["bf16"] | Fp8Format = "bf16"
    """bf16 as given, or e4m3 with a power of two per 128 x 128 block, gate and up separately."""
    bf16_products: bool = False
    """Gate and up are rounded to bf16 as the first product stores them, before routing weights, bias and activation."""
    bf16_activation: bool = False
    """The activated gate is rounded to bf16 before it multiplies up; of activations that multiply up as it is."""
    bf16_intermediate: bool = True
    """The activation's product is rounded to bf16, before any other rounding of it."""
    intermediate: Literal["", "e4m3fn", "e4m3fnuz"] = ""
    """e4m3 format of the stored intermediate, with a scale per 128 columns; empty for none."""
    scales: Scales = "power of two"
    """Scales of the intermediate: the least power of two that fits a block into e4m3, or maximum over e4m3's limit."""
    sums: Literal["float32", "bf16"] = "float32"
    """A row's routes are added in float32 and rounded once, or one by one, in any order, into a bf16 row."""
    formula: Formula = Formula()
    """What is computed between the roundings."""

    @property
    def name(self) -> str:
        """The family in a few words, as the name of the ideal in reports."""
        weights = "bf16" if self.weights == "bf16" else f"{self.weights} 128x128"
        steps = ["bf16 gate and up"] if self.bf16_products else []
        steps += ["bf16 activation"] if self.bf16_activation else []
        steps += ["bf16"] if self.bf16_intermediate else []
        steps += [f"{self.intermediate} 1x128"] if self.intermediate else []
        middle = ", then ".join(steps) or "float32"
        total = "one rounding of the sum" if self.sums == "float32" else "a rounding at each add"
        return f"{weights} weights, {middle} intermediate, bf16 routes, {total}"


def roundings_of(case: Case, choice: KernelChoice) -> Roundings:
    """Return the roundings of `choice`'s kernel in the experts of `case`.

    Sources for the Triton kernels and the reference: docs/triton.md, docs/semantics.md. aiter: its two stages store a
    bf16 intermediate, which per_1x128 quantises by its maximum; one stage quantises the float32 intermediate (aiter
    v0.1.20, fused_moe_2stages and quant.py).
    """
    quantised: Literal["", "e4m3fn", "e4m3fnuz"] = case.fp8_format if case.dispatch_dtype == "fp8" else ""
    return Roundings(
        weights=quantised or "bf16",
        bf16_intermediate=not choice.run_1stage,
        intermediate=quantised,
        scales=scales_of(case),
        sums="bf16" if choice.stage2_mode == "atomic" else "float32",
        formula=formula_of(case),
    )


def scales_of(case: Case) -> Scales:
    """Return the kind of scales that the experts of `case` give an e4m3 intermediate."""
    return "maximum" if case.experts == "aiter" else "power of two"


def stored_intermediate(case: Case) -> Stored:
    """Return the dtype in which the experts of `case` hold the intermediate between their two products.

    A one-stage kernel keeps it in float32 where this says bf16.
    """
    return "e4m3" if case.dispatch_dtype == "fp8" else "bf16"
