"""vLLM and SGLang without their compiled modules: names and signatures of the releases, arithmetic in torch.

tests/contract/test_guests.py holds the signatures against the wheels. Each rounds where the package does.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Mapping
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distbench.workload.quantize import quantize_fp8_blocks, through_blocks

VLLM = "vllm.model_executor.layers.fused_moe"
SGLANG = "sglang.srt.layers.moe.moe_runner.triton_utils"
CONFIGS = {rows: {"BLOCK_SIZE_M": rows, "BLOCK_SIZE_N": 64, "BLOCK_SIZE_K": 32, "GROUP_SIZE_M": 1} for rows in (16, 64)}


class Activation(enum.Enum):
    SILU = "silu"


@dataclasses.dataclass
class Layer:
    """vLLM's FusedMoEConfig."""

    num_experts: int
    experts_per_token: int
    hidden_dim: int
    intermediate_size_per_partition: int
    num_local_experts: int
    num_logical_experts: int
    activation: Activation
    device: torch.device | str
    routing_method: Any
    moe_parallel_config: Any
    in_dtype: torch.dtype


def fp8_w8a8_moe_quant_config(
    w1_scale: Tensor, w2_scale: Tensor, block_shape: list[int] | None = None
) -> SimpleNamespace:
    return SimpleNamespace(w1_scale=w1_scale, w2_scale=w2_scale, block_shape=block_shape)


class TritonExperts:
    """Adds routes by one kernel for top-k 2 to 4, which rounds each sum, and by torch else."""

    def __init__(self, moe_config: Layer, quant_config: Any) -> None:
        self.layer, self.quant = moe_config, quant_config

    def workspace_shapes(  # noqa: PLR0913 - the package's
        self,
        M: int,  # noqa: N803 - as above
        N: int,  # noqa: N803
        K: int,  # noqa: N803
        topk: int,
        global_num_experts: int,
        local_num_experts: int,
        expert_tokens_meta: Any,
        activation: Activation,
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
        assert (expert_tokens_meta, activation) == (None, Activation.SILU)
        assert global_num_experts == self.layer.num_experts
        assert local_num_experts == self.layer.num_local_experts
        return (M, topk, max(N // 2, K)), (M, topk, max(N, K)), (M, K)

    def apply(  # noqa: PLR0913 - the package's
        self,
        output: Tensor,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        activation: Activation,
        global_num_experts: int,
        expert_map: Tensor | None,
        a1q_scale: Tensor | None,
        a2_scale: Tensor | None,
        workspace13: Tensor,
        workspace2: Tensor,
        expert_tokens_meta: Any,
        apply_router_weight_on_input: bool,
    ) -> None:
        assert (activation, a2_scale, expert_tokens_meta) == (Activation.SILU, None, None)
        assert expert_map is not None
        assert expert_map.shape == (global_num_experts,)
        assert not apply_router_weight_on_input
        assert workspace13.dtype is workspace2.dtype is torch.bfloat16
        assert topk_ids.dtype is torch.int32
        local = expert_map[topk_ids.long()]
        scales = None if self.quant is None else (self.quant.w1_scale, self.quant.w2_scale)
        made = routes(hidden_states, a1q_scale, w1, w2, topk_weights, local, scales, silu_rounds=True, powers=True)
        if made.shape[1] in range(2, 5):
            total = torch.zeros_like(output)
            for route in made.unbind(1):
                total += route
            output.copy_(total)
        else:
            output.copy_(made.float().sum(1))


class DeepGemmExperts(TritonExperts):
    """Adds routes in float32."""


def try_get_optimal_moe_config(  # noqa: PLR0913 - the package's
    w1_shape: tuple[int, ...],
    w2_shape: tuple[int, ...],
    top_k: int,
    dtype: str | None,
    M: int,  # noqa: N803
    block_shape: list[int] | None = None,
) -> Mapping[str, int]:
    assert w1_shape[0] == w2_shape[0]
    assert w1_shape[1] == 2 * w2_shape[2]
    assert top_k
    assert (dtype == "fp8_w8a8") is (block_shape is not None)
    return CONFIGS[16 if M <= 16 else 64]


def install_vllm(patch: pytest.MonkeyPatch, **changed: Any) -> None:
    """Make the fake vllm importable; `changed` are other values of its names."""
    parallel = SimpleNamespace(make_no_parallel=lambda: "none")
    config = {"FusedMoEConfig": Layer, "FusedMoEParallelConfig": parallel, "FUSED_MOE_UNQUANTIZED_CONFIG": None}
    config |= {"RoutingMethodType": SimpleNamespace(Default=0), "fp8_w8a8_moe_quant_config": fp8_w8a8_moe_quant_config}
    deep_gemm = {"is_deep_gemm_supported": lambda: True, "is_deep_gemm_e8m0_used": lambda: True}
    names: dict[str, dict[str, Any]] = {
        "vllm": {"__version__": "0.22.1"},
        "vllm.model_executor": {},
        "vllm.model_executor.layers": {},
        VLLM: {},
        f"{VLLM}.config": config,
        f"{VLLM}.fused_moe": {"try_get_optimal_moe_config": try_get_optimal_moe_config},
        f"{VLLM}.activation": {"MoEActivation": Activation},
        f"{VLLM}.experts": {},
        f"{VLLM}.experts.triton_moe": {"TritonExperts": TritonExperts},
        f"{VLLM}.experts.deep_gemm_moe": {"DeepGemmExperts": DeepGemmExperts},
        "vllm.utils": {},
        "vllm.utils.deep_gemm": deep_gemm | changed,
    }
    _install(patch, names)


def fused_experts_impl(  # noqa: PLR0913 - the package's
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    b1: Tensor | None = None,
    b2: Tensor | None = None,
    inplace: bool = False,
    activation: str = "silu",
    use_fp8_w8a8: bool = False,
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    block_shape: list[int] | None = None,
    filter_expert: bool = True,
) -> Tensor:
    assert hidden_states.dtype is torch.bfloat16
    assert (b1, b2, inplace, activation, filter_expert) == (None, None, False, "silu", True)
    assert topk_ids.dtype is torch.int32
    assert use_fp8_w8a8 is (block_shape == [128, 128])
    rows, row_scales, scales = hidden_states, None, None
    if use_fp8_w8a8:
        assert w1_scale is not None
        assert w2_scale is not None
        rows, row_scales = quantize_fp8_blocks(hidden_states.nan_to_num(), torch.float8_e4m3fn)
        scales = w1_scale, w2_scale
    made = routes(rows, row_scales, w1, w2, topk_weights, topk_ids, scales, silu_rounds=False, powers=False)
    return made.float().sum(1).bfloat16()


def sglang_tiles(  # noqa: PLR0913 - the package's
    w1_shape: tuple[int, ...],
    w2_shape: tuple[int, ...],
    top_k: int,
    dtype: str | None,
    M: int,  # noqa: N803
    is_marlin: bool = False,
    block_shape: list[int] | None = None,
    per_channel_quant: bool = False,
    return_down_config: bool = False,
) -> Any:
    assert return_down_config
    assert not is_marlin
    assert not per_channel_quant
    up = try_get_optimal_moe_config(w1_shape, w2_shape, top_k, dtype, M, block_shape)
    return up, (None if M <= 16 else CONFIGS[16], None)


def install_sglang(patch: pytest.MonkeyPatch, **changed: Any) -> list[Any]:
    """Make the fake sglang importable; return the list of settings that are given to it."""
    given: list[Any] = []

    def current() -> Any:
        if not given:
            message = "Global server args is not set yet!"
            raise ValueError(message)
        return given[-1]

    settings = {"get_global_server_args": current, "set_global_server_args_for_scheduler": given.append}
    names: dict[str, dict[str, Any]] = {
        "sglang": {"__version__": "0.5.13.post1"},
        "sglang.srt": {},
        "sglang.srt.layers": {},
        "sglang.srt.layers.moe": {},
        "sglang.srt.layers.moe.moe_runner": {},
        SGLANG: {},
        f"{SGLANG}.fused_moe": {"fused_experts_impl": fused_experts_impl},
        f"{SGLANG}.fused_moe_triton_config": {"try_get_optimal_moe_config": sglang_tiles},
        "sglang.srt.server_args": settings | {"ServerArgs": SimpleNamespace} | changed,
    }
    _install(patch, names)
    return given


def routes(  # noqa: PLR0913 - the arguments of a kernel
    hidden: Tensor,
    row_scales: Tensor | None,
    w1: Tensor,
    w2: Tensor,
    shares: Tensor,
    local: Tensor,
    scales: tuple[Tensor, Tensor] | None,
    *,
    silu_rounds: bool,
    powers: bool,
) -> Tensor:
    """Weighted rows bf16 [M, k, H] of local experts; rows of -1 are zeros, and their hidden states are not read."""
    made = torch.zeros(*local.shape, w2.shape[1], dtype=torch.bfloat16)
    first, second = (w1, w2) if scales is None else (_wide(w1, scales[0]), _wide(w2, scales[1]))
    rows = hidden if row_scales is None else _wide_rows(hidden, row_scales)
    for row, slot in (local >= 0).nonzero().tolist():
        expert = int(local[row, slot])
        gate, up = (rows[row].float() @ first[expert].float().t()).bfloat16().chunk(2)
        activated = functional.silu(gate.float())
        middle = ((activated.bfloat16() if silu_rounds else activated) * up).bfloat16()
        if scales is not None:
            middle = through_blocks(middle, torch.float8_e4m3fn, power_of_two=powers).float()
        made[row, slot] = (middle.float() @ second[expert].float().t() * shares[row, slot]).bfloat16()
    return made


def _wide(weights: Tensor, scales: Tensor) -> Tensor:
    tall = scales.repeat_interleave(128, 1)[:, : weights.shape[1]]
    return weights.float() * tall.repeat_interleave(128, 2)[:, :, : weights.shape[2]]


def _wide_rows(rows: Tensor, scales: Tensor) -> Tensor:
    return rows.float() * scales.repeat_interleave(128, 1)


def _install(patch: pytest.MonkeyPatch, names: dict[str, dict[str, Any]]) -> None:
    for name, values in names.items():
        module = ModuleType(name)
        module.__path__ = []
        module.__dict__.update(values)
        patch.setitem(sys.modules, name, module)
        parent, _, leaf = name.rpartition(".")
        if parent:
            setattr(sys.modules[parent], leaf, module)
