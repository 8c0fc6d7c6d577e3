"""Variables of production: their text as values of a case, and those of MoRI and aiter, whatever program runs them.

A value that production would ignore is refused, with production's reaction to it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from distbench.case.aiter_env import BYPASS_TUNE, KERNEL_TABLES, KSPLIT
from distbench.case.resolve import Layer
from distbench.errors import InvalidCase

LAUNCH_MODE = "MORI_EP_LAUNCH_CONFIG_MODE"
PACKAGE_KEYS = {
    LAUNCH_MODE: "launch_mode",
    KERNEL_TABLES: "kernel_table",
    KSPLIT: "aiter_ksplit",
    BYPASS_TUNE: "aiter_bypass_tune",
}
"""The key of a case that a variable of MoRI or aiter sets."""

_IN_AITER = "fail in aiter's first call"
_DISPATCHED = ("bf16", "fp8")
_POLICIES = (0, 1, 2)


def package_layers(values: Mapping[str, str]) -> list[Layer]:
    """Layers of the variables that MoRI and aiter read; kernel tables of aiter are none of the Triton experts."""
    found = []
    if LAUNCH_MODE in values:
        mode = values[LAUNCH_MODE]
        if mode not in ("MANUAL", "AUTO"):
            refuse(LAUNCH_MODE, mode, "allowed are MANUAL, AUTO", "fail when mori's operator is made")
        found.append(variable_layer(LAUNCH_MODE, {"launch_mode": mode}))
    chosen: dict[str, dict[str, Any]] = {}
    if KERNEL_TABLES in values:
        chosen[KERNEL_TABLES] = {"kernel_table": values[KERNEL_TABLES]}
    if KSPLIT in values:
        chosen[KSPLIT] = {"aiter_ksplit": number(KSPLIT, values[KSPLIT], _IN_AITER)}
    if BYPASS_TUNE in values:
        chosen[BYPASS_TUNE] = {"aiter_bypass_tune": bool(number(BYPASS_TUNE, values[BYPASS_TUNE], _IN_AITER))}
    return [*found, *(Layer(f"env:{name}", keys, unless={"experts": "triton"}) for name, keys in chosen.items())]


def sorting_layers(name: str, values: Mapping[str, str], production: str) -> list[Layer]:
    """Layer of the policy by which aiter sorts, one of 0, 1 and 2, where the variable is set."""
    if name not in values:
        return []
    policy = number(name, values[name], production)
    if policy not in _POLICIES:
        refuse(name, values[name], "aiter has policies 0, 1 and 2", "pass it on")
    return [variable_layer(name, {"sorting_policy": policy})]


def set_variables(environ: Mapping[str, str], names: Sequence[str]) -> dict[str, str]:
    """The variables of `names` that are set; an empty value, or one of spaces, counts as unset."""
    return {name: environ[name] for name in names if environ.get(name, "").strip()}


def variable_layer(name: str, values: Mapping[str, Any]) -> Layer:
    """Layer of the keys that a variable sets."""
    return Layer(source=f"env:{name}", values=values)


def dispatched_layer(name: str, dtype: str) -> Layer:
    """Layer of the type of dispatched rows, which is unsupported where distbench dispatches none of it."""
    unsupported = (
        ""
        if dtype in _DISPATCHED
        else (
            f"env:{name}: production dispatches {dtype} rows, distbench bf16 and fp8; unset it, or give "
            "--dispatch-dtype"
        )
    )
    return Layer(f"env:{name}", {"dispatch_dtype": dtype}, unsupported=unsupported)


def returned_layer(name: str, quant: str) -> Layer:
    """Layer of the quantisation of returned expert rows, which the transport collective does not support."""
    return Layer(f"env:{name}", {"combine_quant": quant}, unless={"transport": "collective"})


def word(name: str, text: str, allowed: Sequence[str], production: str) -> str:
    """The text in lower case, one of `allowed`."""
    lower = text.lower()
    if lower not in allowed:
        refuse(name, text, f"allowed are {', '.join(allowed)}", production)
    return lower


def number(name: str, text: str, production: str) -> int:
    """The text as a whole number."""
    try:
        return int(text)
    except ValueError:
        refuse(name, text, "not a whole number", production)


def boolean(name: str, text: str, words: tuple[Sequence[str], Sequence[str]], production: str) -> bool:
    """Whether the text is one of the words for on, and not one of those for off, in this order."""
    yes, no = words
    return word(name, text, (*yes, *no), production) in yes


def refuse(name: str, text: str, reason: str, production: str) -> NoReturn:
    """Refuse a value that production would not take as it is written.

    Raises:
        InvalidCase: names the variable, its value, the reason and production's reaction.

    """
    message = f"env:{name} = {text!r:.60}: {reason}; production would {production}; correct or unset it"
    raise InvalidCase(message)
