"""The definitions of vLLM that are lifted, by file: read in the wheel 0.33.0 (docs/callers.md)."""

from __future__ import annotations

_LAYERS = "vllm/model_executor/layers/fused_moe"
ACTIVATION = f"{_LAYERS}/activation.py"
KERNEL = f"{_LAYERS}/modular_kernel.py"
EXPERTS = f"{_LAYERS}/experts/rocm_aiter_moe.py"
PREPARE = f"{_LAYERS}/prepare_finalize/mori.py"
EXPERT_MAP = f"{_LAYERS}/expert_map_manager.py"
AITER_OPS = "vllm/_aiter_ops.py"

_IMPLEMENTATION = ("_prepare", "_fused_experts", "_finalize", "apply")
_OF_EXPERTS = ("is_monolithic", "moe_problem_size", "workspace_dtype", "output_hidden_dim")

DEFINITIONS: dict[str, tuple[str, ...]] = {
    ACTIVATION: ("MoEActivation", "_STR_ALIASES", "_CUSTOM_OP_NAMES", "_WITHOUT_MUL"),
    KERNEL: (
        *("FusedMoEActivationFormat", "ExpertTokensMetadata"),
        *(f"FusedMoEExpertsModular.{name}" for name in _OF_EXPERTS),
        *(f"FusedMoEKernelModularImpl.{name}" for name in _IMPLEMENTATION),
    ),
    AITER_OPS: (
        *("_validate_rocm_aiter_fused_moe_shared_expert_args", "_rocm_aiter_fused_moe_impl"),
        "rocm_aiter_ops.fused_moe",
    ),
    EXPERTS: ("QuantMethod", "ActivationMethod", "aiter_moe_pads", "rocm_aiter_fused_experts", "AiterExperts"),
    PREPARE: ("MoriPrepareAndFinalize",),
    EXPERT_MAP: ("determine_expert_map",),
}
