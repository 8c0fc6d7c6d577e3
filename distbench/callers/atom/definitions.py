"""The definitions of ATOM that are lifted, by file: read in the snapshot of 2026-08-22 (docs/callers.md)."""

from __future__ import annotations

from distbench.case.atom_folder import KERNEL, PLUGIN, PLUGIN_CONFIG, PREPARE

_FORMATS = ("_FP4_DISPATCH", "_FP8_DTYPES", "MoriDispatchFormat", "resolve_mori_dispatch")
_OF_PREPARE = (
    *("__init__", "use_fp4_dispatch", "use_fp8_dispatch", "quant_type", "activation_format", "output_is_reduced"),
    *("num_dispatchers", "max_num_tokens_per_rank", "topk_indices_dtype", "supports_async", "_get_dispatch_config"),
    *("prepare", "finalize"),
)

DEFINITIONS: dict[str, tuple[str, ...]] = {
    KERNEL: (
        *("FusedMoEActivationFormat", "ExpertTokensMetadata", "FusedMoEPrepareAndFinalize"),
        "FusedMoEModularKernel",
    ),
    PREPARE: (*_FORMATS, *(f"MoriPrepareAndFinalize.{name}" for name in _OF_PREPARE)),
    PLUGIN_CONFIG: ("VLLM_MORI_LAUNCH_CONFIG_TOKEN_THRESHOLD",),
    PLUGIN: (
        *("_MORI_PATCH_APPLIED", "_is_stream_capturing", "_is_uniform_full_graph_batch", "_try_get_exact_valid_rows"),
        *("trim_vllm_mori_dispatch_tensors", "apply_vllm_mori_patch"),
    ),
}
