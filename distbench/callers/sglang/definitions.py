"""The definitions of SGLang that are lifted, by file: read in the wheel 0.5.23 (docs/callers.md)."""

from __future__ import annotations

ENVIRON = "sglang/srt/environ.py"
COMMON = "sglang/srt/utils/common.py"
MODES = "sglang/srt/layers/moe/utils.py"
BASE = "sglang/srt/layers/moe/moe_runner/base.py"
RUNNER = "sglang/srt/layers/moe/moe_runner/aiter.py"
DISPATCHER = "sglang/srt/layers/moe/token_dispatcher/moriep.py"

MORI_VARIABLES = (
    "SGLANG_MORI_NUM_MAX_DISPATCH_TOKENS_PER_RANK",
    "SGLANG_MORI_EP_V2",
    "SGLANG_MORI_DISPATCH_DTYPE",
    "SGLANG_MORI_RECV_BOUND",
    "SGLANG_MORI_MOE_MAX_INPUT_TOKENS",
)
AITER_VARIABLES = (
    "SGLANG_USE_AITER_MOE_GU_ITLV",
    "SGLANG_AITER_MOE_SORTING_DISPATCH_POLICY",
    "SGLANG_ROCM_SMALLM_MOE",
)

_FIELDS = ("EnvField", "EnvStr", "EnvBool", "EnvInt")

DEFINITIONS: dict[str, tuple[str, ...]] = {
    ENVIRON: (*_FIELDS, *(f"Envs.{name}" for name in (*MORI_VARIABLES, *AITER_VARIABLES))),
    COMMON: ("get_bool_env_var", "_warned_bool_env_var_keys"),
    MODES: ("DeepEPMode",),
    BASE: ("MoeRunnerConfig", "RunnerInput", "RunnerOutput", "MoeQuantInfo", "MoeRunnerCore"),
    RUNNER: (
        *("_SMALLM_MOE_ON", "_MOE_SORTING_DISPATCH_POLICY"),
        *("AiterQuantType", "AiterMoeQuantInfo", "AiterRunnerInput", "AiterRunnerOutput"),
        *("_AITER_ACTIVATIONS", "_AITER_SWIGLU_OAI_ALPHA", "_AITER_SWIGLU_OAI_BETA"),
        *("aiter_swiglu_oai_limit", "_aiter_activation", "_aiter_quant_type"),
        *("_aiter_fused_moe_supports_no_combine", "_aiter_fused_moe_supports_output", "AiterRunnerCore"),
        *("_is_mori_dispatch_output", "_resolve_mori_quant_type", "_pre_permute_deepep_to_aiter"),
        *("_post_permute_aiter_to_deepep", "post_permute_aiter_to_deepep_normal"),
    ),
    DISPATCHER: (
        *("FP8_BLOCK_SIZE", "MXFP4_BLOCK_SIZE", "MORI_MIN_LOGICAL_RECV_ROWS", "MORI_LOGICAL_RECV_ROW_ALIGN"),
        *("round_logical_recv_rows", "mori_recv_bound"),
        *("MoriEPNormalDispatchOutput", "MoriEPLLDispatchOutput", "MoriEPNormalCombineInput", "MoriEPLLCombineInput"),
        *("DispatchDtype", "CombineDtype", "_MoriEPDispatcherImplBase", "_MoriEPv1DispatcherImplBase"),
        *("_MoriEPDispatcherImplNormal", "_Stage", "MoriEPDispatcher"),
    ),
}
