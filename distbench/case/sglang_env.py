"""The environment of SGLang's MoRI path, parsed as production does, except that nothing is ignored silently.

Sources: SGLang's `environ.py` and `moriep.py` by release (sglang_releases.py), MoRI's `env_utils.hpp`, and aiter's
`fused_moe.py`; docs/production.md has them as a table.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from distbench.case.aiter_env import BYPASS_TUNE, KERNEL_TABLES, KSPLIT
from distbench.case.resolve import Layer
from distbench.case.sglang_releases import (
    COMBINE_DTYPE,
    DISPATCH_DTYPE,
    DISPATCH_TOKENS,
    EP_V2,
    FIRST,
    FP4_DISPATCH,
    FP8_COMBINE,
    FP8_DISPATCH,
    KERNEL_SWITCH,
    LIMIT,
    PREALLOC,
    RECV_BOUND,
    SDMA,
    VARIABLES,
    reads,
    rules_of,
    sglang_enables,
)
from distbench.errors import InvalidCase
from distbench.utils.versions import release_of

LAUNCH_MODE = "MORI_EP_LAUNCH_CONFIG_MODE"

_ROWS = {
    LIMIT: "limit",
    DISPATCH_TOKENS: "max_dispatch_tokens_per_rank",
    PREALLOC: "prealloc_max_recv_tokens",
    KERNEL_SWITCH: "inter_kernel_switch",
}
KEYS = _ROWS | {
    RECV_BOUND: "recv_bound",
    DISPATCH_DTYPE: "dispatch_dtype",
    FP8_DISPATCH: "dispatch_dtype",
    FP4_DISPATCH: "dispatch_dtype",
    COMBINE_DTYPE: "combine_quant",
    FP8_COMBINE: "combine_quant",
    LAUNCH_MODE: "launch_mode",
    SDMA: "mori_kernel",
    KERNEL_TABLES: "kernel_table",
    KSPLIT: "aiter_ksplit",
    BYPASS_TUNE: "aiter_bypass_tune",
}
"""The key of a case that a variable sets."""

_MEANING_OF_BAD = {
    LIMIT: "warn, fall back to 0 and cut nothing",
    DISPATCH_TOKENS: "warn and fall back to 4096",
    PREALLOC: "fall back to 0 and size the buffer for the worst case",
    RECV_BOUND: "warn and leave the bound off",
    KERNEL_SWITCH: "fall back to 256",
    DISPATCH_DTYPE: "ignore it and take the type of the weights",
    COMBINE_DTYPE: "ignore it and take the type that goes with the weights",
    LAUNCH_MODE: "fail when mori's operator is made",
    EP_V2: "warn and take the default",
    KSPLIT: "fail in aiter's first call",
    BYPASS_TUNE: "fail in aiter's first call",
}
_COMBINE_QUANT = {
    "bf16": "none",
    "fp8": "fp8_blockwise",
    "fp8_direct_cast": "fp8_direct_cast",
    "fp4": "fp4_blockwise",
}
_EP_V2_YES, _EP_V2_NO = ("true", "1", "yes", "y"), ("false", "0", "no", "n")
_DISPATCHED = ("bf16", "fp8")

KNOWN_NAMES = (
    *VARIABLES,
    "SGLANG_MORI_QP_PER_TRANSFER",
    "SGLANG_MORI_POST_BATCH_SIZE",
    "SGLANG_MORI_NUM_WORKERS",
)
_LOOKALIKE_RATIO = 0.85
_PREFIX = "SGLANG_"
_IO_ENGINE = "MORI_IO_"
"""MoRI's own variables for the transfer of the KV cache, some with names similar to SGLang's."""

RECORDED_PREFIXES = (
    *("SGLANG_MORI_", "SGLANG_USE_AITER", "SGLANG_AITER_", "SGLANG_ROCM_"),
    *("MORI_", "NCCL_", "RCCL_", "TORCH_", "GLOO_", "OMP_", "HIP_", "HSA_", "ROCR_", "ATOM_", "VLLM_ROCM_"),
    # Variables that aiter reads: its own, those of its kernel families and of the device that it targets.
    *("AITER_", "FLYDSL_", "GPTOSS_SWIGLU_", "GPU_ARCHS", "CU_NUM", "CK_DIR"),
)
_SECRET = re.compile(r"SECRET|PASSW|CREDENTIAL|PRIVATE|API_?KEY|ACCESS_?KEY|AUTH|(?:^|_)TOKEN$|COOKIE", re.IGNORECASE)


def sglang_layer(layers: Sequence[Layer]) -> Layer:
    """Layer with the SGLang release whose variables apply: from `layers`, else the installed one, else the newest.

    An installed release that cannot be compared, or has no MoRI path, counts as none.
    """
    asked = next((layer.values["sglang_version"] for layer in layers if "sglang_version" in layer.values), None)
    if asked is not None:
        return Layer("", {"sglang_version": asked})
    try:
        installed = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return Layer("", {})
    found, first = release_of(installed), release_of(FIRST)
    return Layer("installed sglang", {"sglang_version": installed} if found and first and found >= first else {})


def read_environment(environ: Mapping[str, str], layers: Sequence[Layer] = ()) -> list[Layer]:
    """Layers of the production variables that are set; an empty value counts as unset.

    `layers` are stronger than the environment, and may name the SGLang release whose rules apply.

    Raises:
        InvalidCase: a value that production would ignore, with production's reaction; or an unknown SGLang release.

    """
    release = sglang_layer(layers)
    version = str(release.values.get("sglang_version", ""))
    rules_of(version)
    named = {name: environ.get(name, "") for name in (*KEYS, EP_V2)}
    values = {
        name: text for name, text in named.items() if text.strip() and (name not in VARIABLES or reads(name, version))
    }
    found = [release] if release.source else []
    for name, key in _ROWS.items():
        if name in values:
            found.append(_layer(name, {key: _rows(name, values[name].strip())}))
    return [
        *found,
        *_recv_bound(values, version),
        *_dispatch(values, version),
        *_combine(values, version),
        *_others(values),
    ]


def near_misses(environ: Mapping[str, str]) -> list[str]:
    """Warnings about unset production variables for which a nearly identical name is set."""
    return [
        f"{name}={environ[name]!r:.60} has no effect: production reads {_by_release(known)}; rename or unset it"
        for name in sorted(environ)
        if (known := near_miss(name, environ))
    ]


def near_miss(name: str, environ: Mapping[str, str]) -> str:
    """Name that was probably meant by `name`; empty where it is set too, since `name` then belongs to a launcher."""
    known = None if name in KNOWN_NAMES else _lookalike(name)
    return known if known and not environ.get(known, "").strip() else ""


def _by_release(name: str) -> str:
    """The name, with the releases that read it where the newest does not."""
    span = VARIABLES.get(name)
    return f"{name} (SGLang {span})" if span and span.last else name


def recorded_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Variables that can change a result, for the report; never the whole environment, and no secret."""
    return {name: environ[name] for name in sorted(environ) if _is_recorded(name) and not is_secret(name)}


def is_secret(name: str) -> bool:
    """Whether a variable's name marks it as a secret."""
    return _SECRET.search(name) is not None


def _is_recorded(name: str) -> bool:
    return name.startswith(RECORDED_PREFIXES) or "_MORI_" in name


def _lookalike(name: str) -> str | None:
    upper = name.upper()
    if upper in KNOWN_NAMES:
        return upper
    if "MORI" not in upper or upper.startswith(_IO_ENGINE):
        return None
    close = difflib.get_close_matches(upper.removeprefix(_PREFIX), _SHORT_NAMES, n=1, cutoff=_LOOKALIKE_RATIO)
    return _PREFIX + close[0] if close else None


_SHORT_NAMES = [name.removeprefix(_PREFIX) for name in KNOWN_NAMES if name.startswith(_PREFIX)]


def _recv_bound(values: Mapping[str, str], version: str) -> list[Layer]:
    if RECV_BOUND not in values:
        return []
    rules = rules_of(version)
    return [
        _layer(RECV_BOUND, {"recv_bound": _boolean(RECV_BOUND, values[RECV_BOUND], rules.yes_words, rules.no_words)})
    ]


def _dispatch(values: Mapping[str, str], version: str) -> list[Layer]:
    """Layers of the newer variable for the dispatched type, else of the older ones."""
    if DISPATCH_DTYPE in values:
        word = _word(DISPATCH_DTYPE, values[DISPATCH_DTYPE], rules_of(version).dispatch_words)
        return [] if word == "auto" else [_dispatched(DISPATCH_DTYPE, word)]
    if sglang_enables(values.get(FP4_DISPATCH, "")):
        return [_dispatched(FP4_DISPATCH, "fp4")]
    return [_dispatched(FP8_DISPATCH, "fp8")] if sglang_enables(values.get(FP8_DISPATCH, "")) else []


def _dispatched(name: str, word: str) -> Layer:
    unsupported = (
        ""
        if word in _DISPATCHED
        else (
            f"env:{name}: production dispatches {word} rows, distbench bf16 and fp8; unset it, or give --dispatch-dtype"
        )
    )
    return Layer(f"env:{name}", {"dispatch_dtype": word}, unsupported=unsupported)


def _combine(values: Mapping[str, str], version: str) -> list[Layer]:
    rules = rules_of(version)
    if COMBINE_DTYPE in values:
        word = _word(COMBINE_DTYPE, values[COMBINE_DTYPE], rules.combine_words)
        return [] if word == "auto" else [_returned(COMBINE_DTYPE, _COMBINE_QUANT[word])]
    return [_returned(FP8_COMBINE, rules.fp8_combine)] if sglang_enables(values.get(FP8_COMBINE, "")) else []


def _returned(name: str, quant: str) -> Layer:
    """Layer of the quantisation of returned expert rows, which the transport collective does not support."""
    return Layer(f"env:{name}", {"combine_quant": quant}, unless={"transport": "collective"})


def _others(values: Mapping[str, str]) -> list[Layer]:
    found = []
    if LAUNCH_MODE in values:
        if values[LAUNCH_MODE] not in ("MANUAL", "AUTO"):
            _refuse(LAUNCH_MODE, values[LAUNCH_MODE], "allowed are MANUAL, AUTO")
        found.append(_layer(LAUNCH_MODE, {"launch_mode": values[LAUNCH_MODE]}))
    if sglang_enables(values.get(SDMA, "")):
        found.append(_layer(SDMA, {"mori_kernel": "AsyncLL"}))
    if EP_V2 in values and _boolean(EP_V2, values[EP_V2], _EP_V2_YES, _EP_V2_NO):
        message = f"env:{EP_V2}: production takes MoRI's EPv2, distbench runs EPv1; set it to false, or unset it"
        found.append(Layer(f"env:{EP_V2}", {}, unsupported=message))
    return [*found, *_kernel_choice(values)]


def _kernel_choice(values: Mapping[str, str]) -> list[Layer]:
    """Layers that change aiter's choice of kernels; the Triton experts have their own tables."""
    found: dict[str, dict[str, Any]] = {}
    if KERNEL_TABLES in values:
        found[KERNEL_TABLES] = {"kernel_table": values[KERNEL_TABLES]}
    if KSPLIT in values:
        found[KSPLIT] = {"aiter_ksplit": _number(KSPLIT, values[KSPLIT])}
    if BYPASS_TUNE in values:
        found[BYPASS_TUNE] = {"aiter_bypass_tune": bool(_number(BYPASS_TUNE, values[BYPASS_TUNE]))}
    return [Layer(f"env:{name}", chosen, unless={"experts": "triton"}) for name, chosen in found.items()]


def _layer(name: str, values: Mapping[str, Any]) -> Layer:
    return Layer(source=f"env:{name}", values=values)


def _word(name: str, text: str, allowed: Sequence[str]) -> str:
    word = text.lower()
    if word not in allowed:
        _refuse(name, text, f"allowed are {', '.join(allowed)}")
    return word


def _rows(name: str, text: str) -> int:
    value = _number(name, text)
    if value < 0:
        _refuse(name, text, "negative", "take it as off" if name != DISPATCH_TOKENS else "fail later, on allocation")
    if value == 0 and name == DISPATCH_TOKENS:
        _refuse(name, text, "no token could be sent", "fail later, on allocation")
    return value


def _number(name: str, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        _refuse(name, text, "not a whole number")


def _boolean(name: str, text: str, yes: Sequence[str], no: Sequence[str]) -> bool:
    lower = text.lower()
    if lower not in (*yes, *no):
        _refuse(name, text, f"allowed are {', '.join((*yes, *no))}")
    return lower in yes


def _refuse(name: str, text: str, reason: str, production: str = "") -> NoReturn:
    would = production or _MEANING_OF_BAD[name]
    message = f"env:{name} = {text!r:.60}: {reason}; production would {would}; correct or unset it"
    raise InvalidCase(message)
