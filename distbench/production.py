"""The environment of SGLang's MoRI path, read as production reads it, except that nothing is ignored silently.

Sources: SGLang's `python/sglang/srt/environ.py` and `moriep.py` as described in docs/production.md.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, NoReturn

from distbench.errors import InvalidCase
from distbench.resolve import Layer

LIMIT = "SGLANG_MORI_MOE_MAX_INPUT_TOKENS"
DISPATCH_TOKENS = "SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK"
PREALLOC = "SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS"
RECV_BOUND = "SGLANG_MORI_RECV_BOUND"
KERNEL_SWITCH = "SGLANG_MORI_DISPATCH_INTER_KERNEL_SWITCH_THRESHOLD"
COMBINE_DTYPE = "SGLANG_MORI_COMBINE_DTYPE"
LAUNCH_MODE = "MORI_EP_LAUNCH_CONFIG_MODE"
SDMA = "MORI_ENABLE_SDMA"

KEYS = {
    LIMIT: "limit",
    DISPATCH_TOKENS: "max_dispatch_tokens_per_rank",
    PREALLOC: "prealloc_max_recv_tokens",
    RECV_BOUND: "recv_bound",
    KERNEL_SWITCH: "inter_kernel_switch",
}
# What a value of these chooses; None is the default.
_CHOICES: dict[str, tuple[str, dict[str, str | None]]] = {
    COMBINE_DTYPE: (
        "combine_quant",
        {
            "auto": None,
            "bf16": "none",
            "fp8": "fp8_blockwise",
            "fp8_direct_cast": "fp8_direct_cast",
            "fp4": "fp4_blockwise",
        },
    ),
    LAUNCH_MODE: ("launch_mode", {"MANUAL": "MANUAL", "AUTO": "AUTO"}),
    SDMA: ("mori_kernel", {"1": "AsyncLL", "true": "AsyncLL", "0": None, "false": None}),
}
_MEANING_OF_BAD = {
    LIMIT: "warn, fall back to 0 and cut nothing",
    DISPATCH_TOKENS: "warn and fall back to 4096",
    PREALLOC: "warn, fall back to 0 and size the buffer for the worst case",
    RECV_BOUND: "warn and leave the bound off",
    KERNEL_SWITCH: "warn and fall back to 256",
    COMBINE_DTYPE: "fail at start",
    LAUNCH_MODE: "fail when mori's operator is made",
    SDMA: "leave SDMA off",
}
_TRUE = ("true", "1", "yes", "y")
_FALSE = ("false", "0", "no", "n")

KNOWN_NAMES = (
    *KEYS,
    "SGLANG_MORI_DISPATCH_DTYPE",
    COMBINE_DTYPE,
    "SGLANG_MORI_FP8_COMB",
    "SGLANG_MORI_FP8_DISP",
    "SGLANG_MORI_FP4_DISP",
    "SGLANG_MORI_NO_PAD_MASK",
    "SGLANG_MORI_QP_PER_TRANSFER",
    "SGLANG_MORI_POST_BATCH_SIZE",
    "SGLANG_MORI_NUM_WORKERS",
)
_LOOKALIKE_RATIO = 0.85
_PREFIX = "SGLANG_"

RECORDED_PREFIXES = (
    *("SGLANG_MORI_", "MORI_", "NCCL_", "RCCL_", "TORCH_", "GLOO_", "OMP_", "HIP_", "HSA_", "ROCR_"),
    # What aiter reads: its own, its kernel families' and the device it is told to be.
    *("AITER_", "FLYDSL_", "GPTOSS_SWIGLU_", "GPU_ARCHS", "CU_NUM", "CK_DIR"),
)


def read_environment(environ: Mapping[str, str]) -> list[Layer]:
    """Return one layer for each production variable that is set; an empty value counts as unset.

    Raises:
        InvalidCase: a value that production would ignore with a warning at most; says what it would have done.

    """
    layers = []
    for name, key in KEYS.items():
        text = environ.get(name, "").strip()
        if text:
            value: Any = _boolean(name, text) if name == RECV_BOUND else _rows(name, text)
            layers.append(Layer(source=f"env:{name}", values={key: value}))
    for name, (key, choices) in _CHOICES.items():
        text = environ.get(name, "").strip()
        if text and text not in choices:
            _refuse(name, text, f"allowed are {', '.join(choices)}", _MEANING_OF_BAD[name])
        if choices.get(text) is not None:
            layers.append(Layer(source=f"env:{name}", values={key: choices[text]}))
    return layers


def near_misses(environ: Mapping[str, str]) -> list[str]:
    """Return a warning for each variable whose name is almost, but not quite, one that production reads."""
    warnings = []
    for name in sorted(environ):
        known = None if name in KNOWN_NAMES else _lookalike(name)
        if known:
            warnings.append(f"{name}={environ[name]!r:.60} has no effect: production reads {known}; rename or unset it")
    return warnings


def recorded_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that can change a result, for the report; never the whole environment."""
    return {name: environ[name] for name in sorted(environ) if name.startswith(RECORDED_PREFIXES)}


def _lookalike(name: str) -> str | None:
    upper = name.upper()
    if upper in KNOWN_NAMES:
        return upper
    if "MORI" not in upper:
        return None
    close = difflib.get_close_matches(upper.removeprefix(_PREFIX), _SHORT_NAMES, n=1, cutoff=_LOOKALIKE_RATIO)
    return _PREFIX + close[0] if close else None


_SHORT_NAMES = [name.removeprefix(_PREFIX) for name in KNOWN_NAMES]


def _rows(name: str, text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        _refuse(name, text, "not a whole number", _MEANING_OF_BAD[name])
    if value < 0:
        _refuse(name, text, "negative", "take it as off" if name != DISPATCH_TOKENS else "fail later, on allocation")
    if value == 0 and name == DISPATCH_TOKENS:
        _refuse(name, text, "no token could be sent", "fail later, on allocation")
    return value


def _boolean(name: str, text: str) -> bool:
    lower = text.lower()
    if lower not in _TRUE + _FALSE:
        _refuse(name, text, f"allowed are {', '.join(_TRUE + _FALSE)}", _MEANING_OF_BAD[name])
    return lower in _TRUE


def _refuse(name: str, text: str, reason: str, production: str) -> NoReturn:
    message = f"env:{name} = {text!r:.60}: {reason}; production would {production}; correct or unset it"
    raise InvalidCase(message)
