"""The environment of SGLang's MoRI path, parsed as production does, except that nothing is ignored silently.

Sources: SGLang's `environ.py` and `moriep.py` by release (sglang_releases.py), MoRI's `env_utils.hpp`, and aiter's
`fused_moe.py`; docs/production.md has them as a table.
"""

from __future__ import annotations

import difflib
import importlib.metadata
import re
from collections.abc import Mapping, Sequence

from distbench.case.resolve import Layer, asked_value
from distbench.case.sglang_releases import (
    COMBINE_DTYPE,
    DISPATCH_DTYPE,
    DISPATCH_TOKENS,
    EP_V2,
    EP_V2_WORDS,
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
from distbench.case.variables import (
    PACKAGE_KEYS,
    boolean,
    dispatched_layer,
    number,
    package_layers,
    refuse,
    returned_layer,
    set_variables,
    variable_layer,
    word,
)
from distbench.utils.versions import release_of

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
    SDMA: "mori_kernel",
    **PACKAGE_KEYS,
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
    EP_V2: "warn and take the default",
}
_COMBINE_QUANT = {
    "bf16": "none",
    "fp8": "fp8_blockwise",
    "fp8_direct_cast": "fp8_direct_cast",
    "fp4": "fp4_blockwise",
}

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
    asked = asked_value("sglang_version", layers)
    if asked is not None:
        return Layer("", {"sglang_version": asked})
    try:
        installed = importlib.metadata.version("sglang")
    except importlib.metadata.PackageNotFoundError:
        return Layer("", {})
    found, first = release_of(installed), release_of(FIRST)
    return Layer("installed sglang", {"sglang_version": installed} if found and first and found >= first else {})


def sglang_layers(environ: Mapping[str, str], layers: Sequence[Layer] = ()) -> list[Layer]:
    """Layers of SGLang's variables that are set, and of MoRI's and aiter's; an empty value counts as unset.

    `layers` are stronger than the environment, and may name the SGLang release whose rules apply.

    Raises:
        InvalidCase: a value that production would ignore, with production's reaction; or an unknown SGLang release.

    """
    release = sglang_layer(layers)
    version = str(release.values.get("sglang_version", ""))
    rules_of(version)
    named = set_variables(environ, (*KEYS, EP_V2))
    values = {name: text for name, text in named.items() if name not in VARIABLES or reads(name, version)}
    found = [release] if release.source else []
    for name, key in _ROWS.items():
        if name in values:
            found.append(variable_layer(name, {key: _rows(name, values[name].strip())}))
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
    words = rules.yes_words, rules.no_words
    bounded = boolean(RECV_BOUND, values[RECV_BOUND], words, _MEANING_OF_BAD[RECV_BOUND])
    return [variable_layer(RECV_BOUND, {"recv_bound": bounded})]


def _dispatch(values: Mapping[str, str], version: str) -> list[Layer]:
    """Layers of the newer variable for the dispatched type, else of the older ones."""
    if DISPATCH_DTYPE in values:
        asked = _word(DISPATCH_DTYPE, values[DISPATCH_DTYPE], rules_of(version).dispatch_words)
        return [] if asked == "auto" else [dispatched_layer(DISPATCH_DTYPE, asked)]
    if sglang_enables(values.get(FP4_DISPATCH, "")):
        return [dispatched_layer(FP4_DISPATCH, "fp4")]
    return [dispatched_layer(FP8_DISPATCH, "fp8")] if sglang_enables(values.get(FP8_DISPATCH, "")) else []


def _combine(values: Mapping[str, str], version: str) -> list[Layer]:
    rules = rules_of(version)
    if COMBINE_DTYPE in values:
        asked = _word(COMBINE_DTYPE, values[COMBINE_DTYPE], rules.combine_words)
        return [] if asked == "auto" else [returned_layer(COMBINE_DTYPE, _COMBINE_QUANT[asked])]
    return [returned_layer(FP8_COMBINE, rules.fp8_combine)] if sglang_enables(values.get(FP8_COMBINE, "")) else []


def _others(values: Mapping[str, str]) -> list[Layer]:
    found = package_layers(values)
    if sglang_enables(values.get(SDMA, "")):
        found.append(variable_layer(SDMA, {"mori_kernel": "AsyncLL"}))
    if EP_V2 in values and boolean(EP_V2, values[EP_V2], EP_V2_WORDS, _MEANING_OF_BAD[EP_V2]):
        message = f"env:{EP_V2}: production takes MoRI's EPv2, distbench runs EPv1; set it to false, or unset it"
        found.append(Layer(f"env:{EP_V2}", {}, unsupported=message))
    return found


def _word(name: str, text: str, allowed: Sequence[str]) -> str:
    return word(name, text, allowed, _MEANING_OF_BAD[name])


def _rows(name: str, text: str) -> int:
    value = number(name, text, _MEANING_OF_BAD[name])
    if value < 0:
        refuse(name, text, "negative", "take it as off" if name != DISPATCH_TOKENS else "fail later, on allocation")
    if value == 0 and name == DISPATCH_TOKENS:
        refuse(name, text, "no token could be sent", "fail later, on allocation")
    return value
