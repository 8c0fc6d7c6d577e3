"""vLLM as the caller: its modular kernel with MoRI's dispatch and combine, and its call of `aiter.fused_moe`."""

from __future__ import annotations

from math import prod
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from distbench.callers.base import Caller, CallerContext, Steps
from distbench.callers.fused_moe import WatchedFusedMoe
from distbench.callers.operator import MoriOperator, named
from distbench.callers.packages import PackageText, package_text
from distbench.callers.setting import Setting
from distbench.callers.vllm.environment import dispatch_policy
from distbench.callers.vllm.lifted import Package, Vllm, load
from distbench.case.plugins import Plugin
from distbench.experts.aiter.adapter import AiterExperts
from distbench.experts.base import ExpertWeights
from distbench.transport.base import Transport
from distbench.workload.batch import TokenBatch

_BLOCK = [128, 128]


class VllmCaller(Caller):
    """vLLM's lifted code for one rank; `fused_moe` is that of the package that `experts` use."""

    def __init__(self, text: PackageText, setting: Setting, experts: AiterExperts) -> None:
        """Lift the code, and make the rank's expert mask with it.

        Raises:
            InvalidCase: a variable that vLLM would not accept.
            Unsupported: the release lacks a definition, or one needs something that is not provided here.

        """
        dispatch_policy()
        fused = WatchedFusedMoe(experts)
        self._op = MoriOperator(fused)
        self._vllm = load(text, setting, Package(experts.package.root, fused.fused_moe, self._op.quantizer))
        self.text = self._vllm.text
        self._case, self._experts = setting.case, experts
        with named(text.label):
            self._mask = _expert_mask(self._vllm, setting)

    def run(self, batch: TokenBatch, weights: ExpertWeights, transport: Transport, steps: Steps) -> Tensor:
        """See `Caller.run`."""
        layer = self._experts.prepared(weights)
        with self._op.layer(self.text.label, batch, weights, transport, steps):
            combined: Tensor = self._kernel(weights).apply(
                hidden_states=batch.hidden.to(torch.bfloat16),
                w1=layer.w1,
                w2=layer.w2,
                topk_ids=batch.ids,
                topk_weights=batch.weights,
                activation=self._vllm.activation.SILU,
                global_num_experts=self._case.placed_experts,
                expert_map=self._mask,
            )
        return combined

    def _kernel(self, weights: ExpertWeights) -> Any:
        """VLLM's modular kernel; the memory that its workspace would lend is allocated."""
        case, vllm = self._case, self._vllm
        fp8 = case.dispatch_dtype == "fp8"
        kernel = vllm.kernel.__new__(vllm.kernel)
        kernel.prepare_finalize = vllm.prepare_finalize(
            mori_op=self._op,
            max_tokens_per_rank=case.max_dispatch_tokens_per_rank,
            num_dispatchers=case.ep_size,
            use_fp8_dispatch=fp8,
        )
        layer = self._experts.prepared(weights)
        quant = _quant_config(layer.w1_scale, layer.w2_scale)
        kernel.fused_experts = vllm.experts(_moe_config(case.hidden_size, case.intermediate_size), quant)
        kernel._allocate_buffers = _Buffers(kernel.fused_experts)  # noqa: SLF001 - its workspace is vLLM's own
        return kernel


class _Buffers:
    """`_allocate_buffers` of the modular kernel, without the workspace that layers share."""

    def __init__(self, experts: Any) -> None:
        self._experts = experts

    def __call__(
        self,
        out_dtype: torch.dtype,
        device: torch.device,
        M_chunk: int,  # noqa: N803
        M_full: int,  # noqa: N803
        *layer: Any,
    ) -> tuple[Tensor, Tensor, Tensor, bool]:
        """Both workspaces, the output [M, H] as a view, and that no buffer of a prepare step is used."""
        first, second, shape = self._experts.workspace_shapes(M_chunk, *layer)
        assert M_chunk == M_full  # noqa: S101 - vLLM computes in one chunk
        output = torch.empty(prod(shape), dtype=out_dtype, device=device).view(shape)
        spaces = (torch.empty(size, dtype=out_dtype, device=device) for size in (first, second))
        return next(spaces), next(spaces), output, False


def _expert_mask(vllm: Vllm, setting: Setting) -> Tensor | None:
    """The mask int32 [E + 1] that vLLM makes for aiter; None for one rank."""
    case = setting.case
    _, _, mask = vllm.expert_map(case.ep_size, setting.rank, case.placed_experts, return_expert_mask=True)
    return None if mask is None else mask.to(setting.device)


def _moe_config(hidden_size: int, intermediate_size: int) -> SimpleNamespace:
    """What vLLM's experts read of a layer's configuration: no padding, no limit of an activation."""
    return SimpleNamespace(
        use_mori_kernels=True,
        hidden_dim_unpadded=hidden_size,
        intermediate_size_per_partition=intermediate_size,
        intermediate_size_per_partition_unpadded=intermediate_size,
        intermediate_pad=None,
        tp_size=1,
        swiglu_limit=None,
        activation_situ_beta=None,
        activation_situ_linear_beta=None,
        use_mxfp4_w4a4_dsv4=False,
    )


def _quant_config(w1_scale: Tensor | None, w2_scale: Tensor | None) -> SimpleNamespace:
    """What vLLM's code reads of a quantisation: none, or float8 in blocks of 128 x 128."""
    blocks = w1_scale is not None
    return SimpleNamespace(
        is_block_quantized=blocks,
        is_per_act_token=False,
        is_per_tensor=False,
        per_act_token_quant=False,
        per_out_ch_quant=False,
        use_fp8_w8a8=blocks,
        use_mxfp4_w4a4=False,
        use_mxfp4_w4a16=False,
        block_shape=_BLOCK if blocks else None,
        w1_scale=w1_scale,
        w2_scale=w2_scale,
        a1_scale=None,
        a2_scale=None,
        w1_bias=None,
        w2_bias=None,
    )


def make(context: CallerContext) -> VllmCaller:
    """Return the caller of a rank."""
    case = context.setting.case
    text = package_text(case)
    return VllmCaller(text, context.setting, context.experts)


PLUGIN = Plugin(make=make, name="vllm")
