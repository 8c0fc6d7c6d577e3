"""Lookup keys of tuned rows besides the layer, for every quantisation in aiter's tables.

`run` computes two of them, bf16 and fp8 in blocks; the others exist so that their tables can be queried.
"""

from __future__ import annotations

from typing import NamedTuple

import msgspec

from distbench.experts.selection.choice import Overrides
from distbench.experts.selection.heuristics import LayerKey
from distbench.experts.selection.releases import BucketRules
from distbench.experts.selection.tuned_table import TunedKey
from distbench.utils.amd_arch import fp8_format


class Quant(NamedTuple):
    """A quantisation in a table's terms: its type, and the dtypes of activations and weights; fp8 is the device's."""

    q_type: str
    activations: str
    weights: str

    def dtypes(self, arch: str) -> tuple[str, str]:
        """Cells of q_dtype_a and q_dtype_w on an architecture."""
        own = f"float8_{fp8_format(arch)}"
        first, second = (own if name == "fp8" else name for name in (self.activations, self.weights))
        return f"torch.{first}", f"torch.{second}"


_FP4 = "float4_e2m1fn_x2"
QUANTS: dict[str, Quant] = {
    "bf16": Quant("No", "bfloat16", "bfloat16"),
    "fp8": Quant("per_1x128", "fp8", "fp8"),
    "fp8-per-token": Quant("per_Token", "fp8", "fp8"),
    "fp8-per-tensor": Quant("per_Tensor", "fp8", "fp8"),
    "int8-per-token": Quant("per_Token", "int8", "int8"),
    "int8-per-tensor": Quant("per_Tensor", "int8", "int8"),
    "mxfp8": Quant("per_1x32", "fp8", "fp8"),
    "a4w4": Quant("per_1x32", _FP4, _FP4),
    "a8w4": Quant("per_1x32", "fp8", _FP4),
    "a16w4": Quant("per_1x32", "bfloat16", _FP4),
    "a16i4": Quant("per_1x32", "bfloat16", "int4"),
}
"""Quantisations by name. The heuristics of the first two are known (heuristics.py)."""
_MODELLED = ("bf16", "fp8")
_MODELLED_ACTIVATIONS = ("silu", "gelu", "swiglu")


class Lookup(msgspec.Struct, frozen=True, kw_only=True):
    """The parts of a lookup besides layer and release."""

    quant: str = ""
    """A name in `QUANTS`; empty: the layer's."""
    activation: str = "silu"
    doweight_stage1: bool = False
    """Routing weights are applied in stage 1."""
    overrides: Overrides = Overrides()
    explicit: bool = False
    """The tables themselves were asked for, so there is no answer without a matching row."""

    @property
    def modelled(self) -> bool:
        """Whether the kernel used without a tuned row is known."""
        return (self.quant or "bf16") in _MODELLED and self.activation in _MODELLED_ACTIVATIONS

    def key(self, layer: LayerKey, rules: BucketRules) -> TunedKey:
        """Key under which a release with `rules` looks up the layer."""
        quant = QUANTS[self.quant or layer.quant]
        activations, weights = quant.dtypes(layer.arch)
        return msgspec.structs.replace(
            TunedKey.for_layer(self.of(layer), rules),
            q_type=f"QuantType.{quant.q_type}",
            q_dtype_a=activations,
            q_dtype_w=weights,
        )

    def of(self, layer: LayerKey) -> LayerKey:
        """Return the layer with the lookup's activation and its place of routing weights."""
        return msgspec.structs.replace(layer, activation=self.activation, doweight_stage1=self.doweight_stage1)
