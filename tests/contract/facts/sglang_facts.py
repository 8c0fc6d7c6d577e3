"""SGLang: variables, words, launch geometry, the clamp of the grid, the receive bound and the cut, by release."""

from __future__ import annotations

import ast
import copy
import itertools
import os
import re
from types import SimpleNamespace
from typing import Any, Optional
from unittest.mock import patch

from distbench.callers.sglang.definitions import DEFINITIONS
from distbench.case.profiles import PROFILES
from distbench.case.sglang_releases import SDMA, TRANSFER_VARIABLES, VARIABLES, reads, rules_of, sglang_enables
from distbench.pipeline.recv_bound import recv_bound
from distbench.transport.mori.config import plan_mori
from tests.cases import tiny_case
from tests.contract.facts.fact import Fact
from tests.contract.facts.lifted import lifted_facts
from tests.contract.facts.source import Gone, Source, between, execute

PACKAGE = "sglang"
DISPATCHER = "sglang/srt/layers/moe/token_dispatcher/moriep.py"
RUNNER = "sglang/srt/layers/moe/moe_runner/aiter.py"
ENVIRON = "sglang/srt/environ.py"
COMMON = "sglang/srt/utils/common.py"
HOOK = "sglang/srt/arg_groups/moe_hook.py"

_WORDS = ("true", "True", "1", "on", "yes", "y", "0", "false", "2", " 1", "")
_UNITS = (20, 38, 64, 80, 256, 304)
_MODES = {"INTRA_NODE": "IntraNode", "INTER_NODE": "InterNodeV1", "LOW_LATENCY": "AsyncLL"}
_CUT = ("hidden_states", "a1_scale", "topk_ids", "topk_weights", "output")
_TOKENS = ((0, 1, 7, 33), (64, 64, 64, 64), (0, 0, 0, 0), (33, 0, 0, 0), (31, 1, 0, 0), (7, 64, 33, 1))


def _variables(source: Source) -> set[str]:
    names = [name for name in source.files() if name.endswith(".py") and "/srt/" in name]
    text = "\n".join(source.texts_with("MORI_", names))
    found = set(re.findall(r"\bSGLANG_MORI_[A-Z0-9_]+\b", text)) | set(re.findall(rf"\b{SDMA}\b", text))
    return found - TRANSFER_VARIABLES


def _our_variables(version: str) -> set[str]:
    return {name for name in VARIABLES if reads(name, version)}


def _dispatch_words(source: Source) -> tuple[str, ...]:
    matched = re.search(r"epv2_dtypes = \(\"\", (.*?)\)", source.read(DISPATCHER))
    if matched is None:
        message = f"no epv2_dtypes in {DISPATCHER}"
        raise Gone(message)
    words: tuple[str, ...] = ast.literal_eval(f"({matched[1]},)")
    return words


def _combine_words(source: Source) -> set[str]:
    name = "_MoriEPv1DispatcherImplBase._apply_combine_dtype_override"
    text = ast.unparse(source.definition(DISPATCHER, name))
    return set(re.findall(r"combine_dtype [!=]= '(\w+)'", text))


def _bound_words(source: Source) -> tuple[tuple[str, ...], ...]:
    text = ast.unparse(source.definition(ENVIRON, "EnvBool"))
    return tuple(tuple(ast.literal_eval(words)) for words in re.findall(r"value in (\[.*?\])", text))


def _booleans(source: Source) -> dict[str, bool]:
    given = {"os": os, "logger": SimpleNamespace(warning=lambda *_: None), "_warned_bool_env_var_keys": set()}
    parse = source.lifted(COMMON, ["get_bool_env_var"], given)["get_bool_env_var"]
    found = {}
    for word in _WORDS:
        with patch.dict(os.environ, {SDMA: word}):
            found[repr(word)] = parse(SDMA)
    return found


class _Kernels:
    """`mori.ops.EpDispatchCombineKernelType`: each kernel type is its own name."""

    def __getattr__(self, name: str) -> str:
        return name


_MORI = SimpleNamespace(ops=SimpleNamespace(EpDispatchCombineKernelType=_Kernels()))


def _geometry(source: Source) -> dict[str, tuple[str, int, int, int]]:
    node = copy.deepcopy(source.definition(DISPATCHER, "_get_epv1_launch_configs"))
    node.body = [one for one in node.body if not isinstance(one, ast.Import)]
    given: dict[str, Any] = {
        "mori": _MORI,
        "get_int_env_var": lambda _, default: default,
        "EpMode": SimpleNamespace(**{name: name for name in _MODES}),
        "_MoriEPv1LaunchConfig": SimpleNamespace,
    }
    node.returns = None
    found = execute([node], DISPATCHER, given)["_get_epv1_launch_configs"](4096)
    return {
        mode: (one.kernel_type, one.block_num, one.rdma_block_num, one.warp_num_per_block)
        for mode, one in found.items()
    }


def _our_geometry(version: str) -> dict[str, tuple[str, int, int, int]]:
    found: dict[str, tuple[str, int, int, int]] = {}
    for mode, kernel in _MODES.items():
        values = {"mori_kernel": kernel, "gpu_per_node": 4 if kernel == "InterNodeV1" else 8}
        case = tiny_case(8, transport="mori", emulate=True, sglang_version=version, **values)
        found[mode] = (kernel, *plan_mori(case, {}).launch)
    return found


def _clamped(source: Source) -> dict[str, int]:
    """Blocks of each kernel type on devices of few units: the branch of `init_mori_op` on IntraNode, executed."""
    body = source.definition(DISPATCHER, "init_mori_op").body
    test = "kernel_type == mori.ops.EpDispatchCombineKernelType.IntraNode"
    branches = [node for node in body if isinstance(node, ast.If) and ast.unparse(node.test) == test]
    found = {}
    for kernel, units in itertools.product(_MODES.values(), _UNITS):
        properties = SimpleNamespace(multi_processor_count=units)
        cuda = SimpleNamespace(get_device_properties=lambda _, one=properties: one, current_device=lambda: 0)
        scope = {"mori": _MORI, "kernel_type": kernel, "block_num": 80, "torch": SimpleNamespace(cuda=cuda)}
        found[f"{kernel} on {units}"] = execute([*branches], DISPATCHER, scope)["block_num"]
    return found


def _our_clamped(version: str) -> dict[str, int]:
    found = {}
    for kernel, units in itertools.product(_MODES.values(), _UNITS):
        values = {"mori_kernel": "IntraNode", "cu_count": units, "sglang_version": version}
        blocks = plan_mori(tiny_case(8, transport="mori", emulate=True, **values), {}).launch.blocks
        found[f"{kernel} on {units}"] = blocks if kernel == "IntraNode" else 80
    return found


def _fields(source: Source) -> dict[str, str]:
    """Keywords of MoRI's configuration whose values distbench repeats."""
    body = source.definition(DISPATCHER, "init_mori_op").body
    assigned = {ast.unparse(node.targets[0]): node.value for node in body if isinstance(node, ast.Assign)}
    call = assigned.get("common_kwargs")
    if not isinstance(call, ast.Call):
        message = f"no call that makes common_kwargs in {DISPATCHER}"
        raise Gone(message)
    return {str(one.arg): ast.unparse(one.value) for one in call.keywords}


_FIELDS = {
    "data_type": "data_type",
    "rank": "rank",
    "world_size": "world_size",
    "hidden_dim": "hidden_dim",
    "scale_dim": "scale_dim",
    "scale_type_size": "scale_type_size",
    "max_token_type_size": "params_dtype.itemsize",
    "max_num_inp_token_per_rank": "num_max_dispatch_tokens_per_rank",
    "num_experts_per_rank": "num_local_experts",
    "num_experts_per_token": "router_topk",
    "warp_num_per_block": "warp_num_per_block",
    "block_num": "block_num",
    "max_total_recv_tokens": "get_int_env_var('SGLANG_MORI_PREALLOC_MAX_RECV_TOKENS', 0)",
    "use_external_inp_buf": "use_external_inp_buf",
    "kernel_type": "kernel_type",
    "gpu_per_node": "gpu_per_node",
    "rdma_block_num": "rdma_block_num",
    "num_qp_per_pe": "2",
    "quant_type": "combine_quant_type",
}


def _bound(source: Source) -> dict[str, int | None]:
    """Rows kept of a full view by each rank of four: the bound and its rounding, executed."""
    text = source.read(DISPATCHER)
    names = ("MORI_MIN_LOGICAL_RECV_ROWS", "MORI_LOGICAL_RECV_ROW_ALIGN")
    given: dict[str, Any] = {"Optional": Optional, "get_parallel": None}
    for name in names:
        given[name] = int(between(text, f"\n{name} = ", "\n").rpartition("= ")[2])
    scope = source.lifted(DISPATCHER, ["round_logical_recv_rows", "mori_recv_bound"], given)
    found: dict[str, int | None] = {}
    for tokens, padding in itertools.product(_TOKENS, (0, 1)):
        told = tuple(count + padding for count in tokens)
        case = _bound_case(tokens, told)
        for rank in range(4):
            sizes = {"moe_ep_size": 4, "tp_size": 4, "attn_cp_size": 1, "attn_tp_size": 1, "attn_tp_rank": 0}
            parallel = SimpleNamespace(attn_dp_size=4, attn_dp_rank=rank, **sizes)
            scope["get_parallel"] = lambda one=parallel: one
            bound = scope["mori_recv_bound"](tokens[rank], told)
            cap = scope["round_logical_recv_rows"](bound, False) if bound > 0 else 0
            found[f"{tokens} told {told} rank {rank}"] = cap if 0 < cap < case.capacity else None
    return found


def _bound_case(tokens: tuple[int, ...], told: tuple[int, ...], version: str = "") -> Any:
    named = {"sender_rows": ",".join(map(str, told)), "sglang_version": version}
    return tiny_case(4, tokens=list(tokens), limit="off", recv_bound=True, **named)


def _our_bound(version: str) -> dict[str, int | None]:
    found: dict[str, int | None] = {}
    for tokens, padding in itertools.product(_TOKENS, (0, 1)):
        told = tuple(count + padding for count in tokens)
        rows = recv_bound(_bound_case(tokens, told, version)).rows
        found |= {f"{tokens} told {told} rank {rank}": rows for rank in range(4)}
    return found


def _cut(source: Source) -> dict[str, str]:
    """The condition of the cut, and the slice of each tensor."""
    text = ast.unparse(source.definition(RUNNER, "_pre_permute_deepep_to_aiter"))
    condition = re.search(r"if (0 < mori_max < .*?):", text)
    found = {name: f"{name} = {name}[:mori_max]" for name in _CUT if f"{name} = {name}[:mori_max]" in text}
    return {"condition": condition[1] if condition else ""} | found


_OUR_CUT = {"condition": "0 < mori_max < hidden_states.shape[0]"} | {
    name: f"{name} = {name}[:mori_max]" for name in _CUT
}


def _combine_call(source: Source) -> set[str]:
    text = ast.unparse(source.definition(DISPATCHER, "_MoriEPDispatcherImplNormal._combine_core"))
    return set(re.findall(r"mori_op\.combine\([^)]*\)", text))


_DEFAULTS = {
    "SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK": "max_dispatch_tokens_per_rank",
    "SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY": "sorting_policy",
}
"""Variables by the key of a profile that has their default."""
_OFF = ("SGLANG_MORI_MOE_MAX_INPUT_TOKENS", "SGLANG_MORI_RECV_BOUND", "SGLANG_USE_AITER")
_API = "SGLANG_MORI_EP_V2"


def _defaults(source: Source) -> dict[str, Any]:
    text = source.read(ENVIRON)
    found = {
        name: re.search(rf"^    {name} = Env\w+\((\w+)\)", text, re.MULTILINE) for name in (*_DEFAULTS, *_OFF, _API)
    }
    return {name: ast.literal_eval(one[1]) for name, one in found.items() if one is not None}


def _our_defaults(_: str) -> dict[str, Any]:
    values = PROFILES["sglang-epv1-decode"].values
    assert values["limit"].value == "off"
    return {name: values[key].value for name, key in _DEFAULTS.items()} | dict.fromkeys(_OFF, 0) | {_API: True}


def _api(source: Source) -> list[str]:
    """Conditions under which SGLang falls back to EPv1, in order."""
    body = source.definition(HOOK, "_mori_epv2_unsupported_reason").body
    return [ast.unparse(one.test) for one in body if isinstance(one, ast.If)]


_OUR_API = [
    "cfg.tp_size > 8 and (not is_gfx1250_supported())",
    "not envs.SGLANG_USE_AITER.get()",
    "get_bool_env_var('MORI_ENABLE_SDMA', 'false')",
    "parse_connector_type(cfg.model_path) == ConnectorType.INSTANCE",
    "model_config.dtype != torch.bfloat16",
    "not is_deepseek_v4(model_config.hf_config)",
]

FACTS = (
    Fact("defaults of the profiles' variables", PACKAGE, ENVIRON, _defaults, _our_defaults),
    Fact("reasons to fall back to EPv1", PACKAGE, HOOK, _api, lambda _: _OUR_API),
    Fact("variables that SGLang reads", PACKAGE, "sglang/srt", _variables, _our_variables),
    Fact(
        "words of SGLANG_MORI_DISPATCH_DTYPE",
        PACKAGE,
        DISPATCHER,
        _dispatch_words,
        lambda version: rules_of(version).dispatch_words,
    ),
    Fact(
        "words of SGLANG_MORI_COMBINE_DTYPE",
        PACKAGE,
        DISPATCHER,
        _combine_words,
        lambda version: set(rules_of(version).combine_words),
    ),
    Fact(
        "words of SGLANG_MORI_RECV_BOUND",
        PACKAGE,
        ENVIRON,
        _bound_words,
        lambda version: (rules_of(version).yes_words, rules_of(version).no_words),
    ),
    Fact(
        "words of boolean variables",
        PACKAGE,
        COMMON,
        _booleans,
        lambda _: {repr(word): sglang_enables(word) for word in _WORDS},
    ),
    Fact("launch geometry of each mode", PACKAGE, DISPATCHER, _geometry, _our_geometry),
    Fact("grid clamped to the compute units", PACKAGE, DISPATCHER, _clamped, _our_clamped),
    Fact("keywords of MoRI's configuration", PACKAGE, DISPATCHER, _fields, lambda _: _FIELDS),
    Fact("receive bound", PACKAGE, DISPATCHER, _bound, _our_bound),
    Fact("cut in front of fused_moe", PACKAGE, RUNNER, _cut, lambda _: _OUR_CUT),
    Fact(
        "arguments of combine",
        PACKAGE,
        DISPATCHER,
        _combine_call,
        lambda _: {"mori_op.combine(hidden_states, None, topk_ids)"},
    ),
    *lifted_facts(PACKAGE, DEFINITIONS),
)
