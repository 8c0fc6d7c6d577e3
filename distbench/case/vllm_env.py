"""The environment of vLLM's MoRI path, parsed as vLLM 0.33.0 does (`vllm/envs.py`), but nothing is ignored silently.

docs/profiles.md has the variables as a table.
"""

from __future__ import annotations

from collections.abc import Mapping

from distbench.case.resolve import Layer
from distbench.case.variables import PACKAGE_KEYS, number, package_layers, refuse, set_variables, sorting_layers

_PREFIX = "VLLM_ROCM_"
_AITER, _AITER_MOE = f"{_PREFIX}USE_AITER", f"{_PREFIX}USE_AITER_MOE"
_POLICY = f"{_PREFIX}AITER_MOE_DISPATCH_POLICY"
_SHARED, _FP4 = f"{_PREFIX}USE_AITER_FUSION_SHARED_EXPERTS", f"{_PREFIX}USE_AITER_MOE_A4W4_DSV4"
_TRANSFER = "VLLM_MORIIO_"
_ON = ("true", "1")
_OFF = ("false", "0")
_ENDS = "end with an assertion when the layer is built"

KEYS: Mapping[str, str] = PACKAGE_KEYS | {_POLICY: "sorting_policy"}
"""The key of a case that a variable sets under a profile of vLLM."""
CHECKED = (_AITER, _AITER_MOE, _SHARED, _FP4)
"""Variables whose values are checked, and set no key."""
_ELSEWHERE = frozenset(
    _PREFIX + name
    for name in (
        *("AITER_MLA_ASM_PADDING", "FP8_MFMA_PAGE_ATTN", "FP8_PADDING", "MOE_PADDING"),
        *("MUSE_MOE_ONLINE_QUANT", "MUSE_MOE_REDUCE_DTYPE", "QUICK_REDUCE_CAST_BF16_TO_FP16"),
        *("QUICK_REDUCE_MAX_SIZE_BYTES_MB", "QUICK_REDUCE_MIN_SIZE_BYTES_MB", "QUICK_REDUCE_QUANTIZATION"),
        *("QUICK_REDUCE_QUANTIZATION_MIN_SIZE_KB", "SHUFFLE_KV_CACHE_LAYOUT", "SLEEP_MEM_CHUNK_SIZE"),
        *("USE_AITER_CUSTOM_AR", "USE_AITER_FP4BMM", "USE_AITER_FP8BMM", "USE_AITER_LINEAR", "USE_AITER_LINEAR_HIPBMM"),
        *("USE_AITER_MHA", "USE_AITER_MLA", "USE_AITER_MOE_SITUV2", "USE_AITER_RMSNORM", "USE_AITER_TRITON_GEMM"),
        *("USE_AITER_TRITON_ROPE", "USE_AITER_TRITON_SPARSE_MLA", "USE_AITER_UNIFIED_ATTENTION", "USE_SKINNY_GEMM"),
    )
)


def vllm_layers(environ: Mapping[str, str]) -> list[Layer]:
    """Layers of the variables that MoRI and aiter read, and of those of vLLM that distbench does not run.

    Raises:
        InvalidCase: a value with which vLLM would not run MoRI, or that it would ignore.

    """
    values = set_variables(environ, (*CHECKED, *KEYS))
    for name, wanted in ((_AITER, True), (_AITER_MOE, True), (_SHARED, False)):
        if name in values and _switch(name, values[name]) is not wanted:
            refuse(name, values[name], "MoRI needs aiter's fused_moe without shared experts", _ENDS)
    found = [*package_layers(values), *sorting_layers(_POLICY, values, "end with a ValueError")]
    if _FP4 in values and number(_FP4, values[_FP4], "end with a ValueError"):
        message = f"env:{_FP4}: production quantises activations to fp4, distbench runs bf16 and fp8; unset it"
        found.append(Layer(f"env:{_FP4}", {}, unsupported=message))
    return found


def known_variables() -> frozenset[str]:
    """The variables VLLM_ROCM_* that vLLM 0.33.0 reads."""
    return _ELSEWHERE | {*CHECKED, _POLICY}


def reason_unread(name: str) -> str:
    """Reason why vLLM's MoRI path does not read a variable of vLLM's; "" where it does."""
    if name in CHECKED:
        return ""
    if name.startswith(_TRANSFER):
        return "for the transfer of the KV cache"
    return "not of vLLM's MoRI path" if name in _ELSEWHERE else "vLLM 0.33.0 does not read it"


def _switch(name: str, text: str) -> bool:
    lower = text.lower()
    if lower not in (*_ON, *_OFF):
        refuse(name, text, f"allowed are {', '.join((*_ON, *_OFF))}", "read it as off")
    return lower in _ON
