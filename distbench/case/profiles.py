"""Profiles: what production's programs set of a case, by name, each value with its source.

A profile sets defaults only. Read in the wheels of sglang 0.5.23 and vllm 0.33.0, and in ATOM's snapshot of 2026-08-22
(ffdf3bb5d).
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

NO_PROFILE = "none"
MOST_TOKENS = "max(tokens)"
"""Value of a profile: the tokens of the rank that has most."""
Program = Literal["sglang", "vllm", "atom"]

_MORIEP = "sglang 0.5.23 token_dispatcher/moriep.py"
_ENVIRON = "sglang 0.5.23 srt/environ.py"
_ALL2ALL = "vllm 0.33.0 distributed/device_communicators/all2all.py"
_VLLM_MORI = "vllm 0.33.0 fused_moe/prepare_finalize/mori.py"
_VLLM_UTILS = "vllm 0.33.0 fused_moe/all2all_utils.py"
_ATOM_MORI = "ATOM ffdf3bb5d fused_moe/mori_prepare_finalize.py"
_ATOM_MOE = "ATOM ffdf3bb5d model_ops/moe.py"
_ATOM_CUT = "ATOM ffdf3bb5d fused_moe/modular_kernel.py:285"
_ATOM_PATCH = "ATOM ffdf3bb5d plugin/vllm/mori_patch.py"


class Value(NamedTuple):
    """A value of a case key, and where it was read."""

    value: Any
    source: str


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """Defaults of a case by the key that they set.

    `caller` is the program whose own code the profile runs where its text is at hand; "" with the reason in `no_caller`
    for none.
    """

    program: Program
    about: str
    values: dict[str, Value]
    caller: str = ""
    no_caller: str = ""


def _libraries(transport: str, experts: str) -> dict[str, Value]:
    return {"transport": Value("mori", transport), "experts": Value("aiter", experts)}


_SGLANG = {
    **_libraries(f"{_MORIEP}:334, init_mori_op", "sglang 0.5.23 moe_runner/aiter.py:177, AiterRunnerCore.run"),
    "mori_kernel": Value("auto", f"{_MORIEP}:276, _get_epv1_launch_configs"),
    "inter_kernel_switch": Value(256, f"{_MORIEP}:284"),
    "mori_geometry": Value("sglang", f"{_MORIEP}:276, _get_epv1_launch_configs"),
    "max_dispatch_tokens_per_rank": Value(4096, f"{_ENVIRON}:930"),
    "dispatch_dtype": Value("bf16", f"{_MORIEP}:896, set_quant_config: the type of the weights"),
    "combine_quant": Value("none", f"{_MORIEP}:896, set_quant_config: bf16 and fp8 weights"),
    "combine_input": Value("external", f"{_MORIEP}:965"),
    "limit": Value("off", f"{_ENVIRON}:939 and 944: neither SGLANG_MORI_RECV_BOUND nor a manual limit"),
    "sorting_policy": Value(2, f"{_ENVIRON}:1001"),
}
_VLLM = {
    **_libraries(f"{_ALL2ALL}:922, MoriAll2AllManager", "vllm 0.33.0 fused_moe/config.py:1401"),
    "mori_kernel": Value("auto", f"{_ALL2ALL}:957, _make_all2all_kwargs"),
    "inter_kernel_switch": Value(0, f"{_ALL2ALL}:957: InterNodeV1 between nodes (mori_high_throughput)"),
    "mori_geometry": Value("vllm", f"{_ALL2ALL}:957, _make_all2all_kwargs"),
    "dispatch_dtype": Value("bf16", f"{_VLLM_UTILS}:337: raw rows, or fp8 in blocks where the layer is quantised so"),
    "combine_quant": Value("none", f"{_ALL2ALL}:957: no quant_type, mori's default"),
    "combine_input": Value("external", f"{_ALL2ALL}:957: no use_external_inp_buf, mori's default"),
    "limit": Value("off", f"{_VLLM_MORI}:54, prepare: no cut"),
    "sorting_policy": Value(0, "vllm 0.33.0 envs.py:1322"),
}
_ATOM = {
    **_libraries(f"{_ATOM_MOE}:594, _maybe_make_prepare_finalize", "ATOM ffdf3bb5d fused_moe/modular_kernel.py"),
    "mori_kernel": Value("auto", f"{_ATOM_MORI}:34, init_mori_op"),
    "inter_kernel_switch": Value(0, f"{_ATOM_MORI}:34: InterNodeV1 above 8 ranks"),
    "dispatch_dtype": Value("bf16", f"{_ATOM_MORI}:136, resolve_mori_dispatch: the type of the activations"),
    "combine_quant": Value("none", "ATOM ffdf3bb5d utils/envs.py:330"),
    "combine_input": Value("external", f"{_ATOM_MORI}:79: no use_external_inp_buf, mori's default"),
    "sorting_policy": Value(0, "ATOM ffdf3bb5d fused_moe/modular_kernel.py: not passed, aiter's default"),
}

PROFILES: dict[str, Profile] = {
    "sglang-epv1-decode": Profile(
        program="sglang",
        about="SGLang's EPv1 in normal mode, as many tokens on every rank",
        values=_SGLANG,
        caller="sglang",
    ),
    "sglang-epv1-prefill": Profile(
        program="sglang",
        about="the same operator, other numbers of tokens on every rank, none on some",
        values=_SGLANG | {"tokens": Value((64, 33, 0, 7, "..."), "distbench: a batch that differs between ranks")},
        caller="sglang",
    ),
    "sglang-epv1-lowlatency": Profile(
        program="sglang",
        about="SGLang's EPv1 in low-latency mode, kernel AsyncLL",
        values=_SGLANG | {"mori_kernel": Value("AsyncLL", f"{_MORIEP}:375, init_mori_op")},
        no_caller="its dispatcher of low-latency mode is not lifted",
    ),
    "vllm": Profile(
        program="vllm",
        about="vLLM with all2all backend mori_high_throughput",
        values=_VLLM,
        caller="vllm",
    ),
    "atom-native": Profile(
        program="atom",
        about="ATOM in a decode batch with as many tokens on every rank",
        values=_ATOM
        | {
            "mori_geometry": Value("atom-decode", f"{_ATOM_MORI}:227, _get_dispatch_config"),
            "limit": Value("sum", f"{_ATOM_CUT}: graph_bs * dp, the sum where every rank fills the bucket"),
            "atom_rule": Value("native", f"{_ATOM_CUT}, _maybe_trim_dispatch_output"),
            "atom_graph_bs": Value(MOST_TOKENS, f"{_ATOM_CUT}: all ranks decode, padded to one bucket"),
        },
        caller="atom",
    ),
    "atom-vllm-plugin": Profile(
        program="atom",
        about="ATOM's layers as a plugin of vLLM, in an eager batch",
        values=_ATOM
        | {
            "mori_geometry": Value("atom-decode", f"{_ATOM_PATCH}:107: fewer than 4096 tokens"),
            "limit": Value("max-recv", f"{_ATOM_PATCH}:63: exactly total_recv, here that of the fullest rank"),
            "atom_rule": Value("vllm-plugin", f"{_ATOM_PATCH}:63, trim_vllm_mori_dispatch_tensors"),
            "atom_graph_bs": Value(0, f"{_ATOM_PATCH}:39: no uniform batch of a full graph"),
        },
        caller="atom",
    ),
}


def program_of(profile: str) -> Program:
    """The program whose variables count: the profile's, else SGLang."""
    return PROFILES[profile].program if profile in PROFILES else "sglang"


def caller_of(profile: str, given: Mapping[str, Any], *, by_flag: bool) -> tuple[str, str]:
    """The caller that the profile adds to a case, or "" with the reason for none.

    `given` are the values of the case. Code is executed only where a flag names it, `by_flag` the profile, or a wheel
    or folder, which flags alone may name; and where its text is at hand.
    """
    own = PROFILES[profile]
    text = "" if not own.caller else _text_of(own.caller, given)
    if not own.caller:
        reason = own.no_caller
    elif text:
        return own.caller, ""
    elif own.caller == "atom":
        reason = "no folder has its text; give --caller-folder, a checkout"
    elif find_spec(own.caller) is None:
        reason = f"no package {own.caller} here; install it, or give --caller-wheel"
    elif not by_flag:
        reason = f"no flag names it; give --profile or --caller {own.caller}"
    else:
        return own.caller, ""
    return "", f"its own code does not run: {reason}"


def _text_of(caller: str, given: Mapping[str, Any]) -> str:
    """The folder, or the wheel of the caller's package by its name, that a flag gives; "" for none."""
    if caller == "atom":
        return str(given["caller_folder"])
    wheel = str(given["caller_wheel"])
    return wheel if Path(wheel).name.startswith(caller) else ""
