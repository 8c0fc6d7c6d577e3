"""The environment of ATOM's MoRI path, parsed as ATOM does, except that nothing is ignored silently.

Read in `atom/utils/envs.py` of the snapshot of 2026-08-22; docs/profiles.md has the variables as a table.
"""

from __future__ import annotations

from collections.abc import Mapping

from distbench.case.resolve import Layer
from distbench.case.variables import (
    PACKAGE_KEYS,
    dispatched_layer,
    package_layers,
    refuse,
    returned_layer,
    set_variables,
)

_V2, _FUSED = "ATOM_MORI_V2", "ATOM_MORI_V2_FUSED"
_FP4_DISPATCH, _COMBINE = "ATOM_MORI_FP4_DISPATCH", "ATOM_MORI_COMBINE_QUANT"
_QUANTS = ("none", "fp8_direct_cast", "fp8_blockwise", "fp4_blockwise")

KEYS: Mapping[str, str] = PACKAGE_KEYS | {_FP4_DISPATCH: "dispatch_dtype", _COMBINE: "combine_quant"}
"""The key of a case that a variable sets under a profile of ATOM."""
CHECKED = (_V2,)
"""Variables whose values are checked, and set no key."""


def atom_layers(environ: Mapping[str, str]) -> list[Layer]:
    """Layers of the variables that are set.

    Raises:
        InvalidCase: a value that ATOM would ignore, or that MoRI would refuse.

    """
    values = set_variables(environ, (*CHECKED, *KEYS))
    found = package_layers(values)
    if _V2 in values and _switch(_V2, values[_V2]):
        message = f"env:{_V2}: production takes MoRI's second API, distbench runs EPv1; set it to 0, or unset it"
        found.append(Layer(f"env:{_V2}", {}, unsupported=message))
    if _FP4_DISPATCH in values and _switch(_FP4_DISPATCH, values[_FP4_DISPATCH]):
        found.append(dispatched_layer(_FP4_DISPATCH, "fp4"))
    if _COMBINE in values:
        quant = values[_COMBINE]
        if quant not in _QUANTS:
            refuse(_COMBINE, quant, f"allowed are {', '.join(_QUANTS)}", "fail when mori's operator is made")
        found.append(returned_layer(_COMBINE, quant))
    return found


def reason_unread(name: str) -> str:
    """Reason why ATOM's MoRI path does not read a variable of ATOM's; "" where it does."""
    if name in CHECKED:
        return ""
    return f"ATOM reads it with {_V2}=1 alone" if name == _FUSED else "not of ATOM's MoRI path"


def _switch(name: str, text: str) -> bool:
    """Whether the text is 1, the one word that ATOM takes for on."""
    if text not in ("0", "1"):
        refuse(name, text, "allowed are 0, 1", "read it as off")
    return text == "1"
