"""The experts of other packages, as far as they are installed, for bench_peers.py."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distbench.experts.base import ExpertWeights
from distbench.experts.triton.config import LayerShape
from distbench.workload.batch import TokenBatch
from distbench.workload.quantize import dequantize

BLOCK = 128
Call = Callable[[], Tensor]


class Absent(Exception):
    """A peer is not installed here, or has no kernel for the layer; the message says which."""


class Problem(NamedTuple):
    """One rank's part of a layer, and its rows, all of them live.

    float8 weights and scales are those of the Triton experts: q1 [El, 2I, H], q2 [El, H, I], per 128 x 128.
    """

    shape: LayerShape
    batch: TokenBatch
    local: ExpertWeights
    quantized: tuple[Tensor, Tensor, Tensor, Tensor] | None

    @property
    def rows(self) -> int:
        """Number of rows."""
        return self.batch.hidden.shape[0]

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """Both weights in the type of the layer."""
        return (self.local.w1, self.local.w2) if self.quantized is None else self.quantized[:2]

    @property
    def scales(self) -> tuple[Tensor, Tensor]:
        """Scales of float8 weights [El, N/128, K/128]."""
        if self.quantized is None:
            message = "weights in bf16 have no scales"
            raise ValueError(message)
        _, _, first, second = self.quantized
        local, inter, hidden = self.shape.num_local_experts, self.shape.intermediate_size, self.shape.hidden_size
        return first.view(local, 2 * inter // BLOCK, hidden // BLOCK), second

    def wide_rows(self) -> Tensor:
        """Rows as bf16, for peers that quantise by themselves."""
        return dequantize(self.batch.hidden, self.batch.scales).bfloat16()

    def counts(self) -> Tensor:
        """Routes of each local expert."""
        ids = self.batch.ids
        local = self.shape.num_local_experts
        return torch.bincount(ids[ids < local].long(), minlength=local)


def reference(problem: Problem) -> Tensor:
    """Return the rows in float32."""
    rows = dequantize(problem.batch.hidden, problem.batch.scales)
    total = torch.zeros_like(rows)
    for expert in range(problem.shape.num_local_experts):
        token, slot = (problem.batch.ids == expert).nonzero(as_tuple=True)
        first, second = (matrix[expert].float() for matrix in problem.weights)
        if problem.quantized is not None:
            first, second = (
                matrix * scale[expert].repeat_interleave(BLOCK, 0).repeat_interleave(BLOCK, 1)
                for matrix, scale in zip((first, second), problem.scales, strict=True)
            )
        gate, up = (rows[token] @ first.T).chunk(2, 1)
        part = (torch.nn.functional.silu(gate) * up) @ second.T
        total.index_add_(0, token, part * problem.batch.weights[token, slot].unsqueeze(1))
    return total


def vllm_triton(problem: Problem) -> Call:
    """Return vLLM's Triton experts; with float8 weights they quantise bf16 rows in the call."""
    fused = _module("vllm.model_executor.layers.fused_moe.fused_moe")
    everyone = torch.arange(problem.shape.num_experts, device=problem.batch.ids.device)
    return partial(
        fused.fused_experts,
        problem.wide_rows(),
        *problem.weights,
        problem.batch.weights,
        problem.batch.ids,
        global_num_experts=problem.shape.num_experts,
        expert_map=torch.where(everyone < problem.shape.num_local_experts, everyone, -1).int(),
        quant_config=_vllm_quantisation(problem),
    )


def vllm_deep_gemm(problem: Problem) -> Call:
    """Call of vLLM's DeepGEMM experts, which get the routes of each expert beforehand."""
    if problem.quantized is None:
        message = "vLLM's DeepGEMM experts are for float8"
        raise Absent(message)
    config_of = _module("vllm.model_executor.layers.fused_moe.config")
    modular = _module("vllm.model_executor.layers.fused_moe.modular_kernel")
    kernels = _module("vllm.model_executor.layers.fused_moe.experts.deep_gemm_moe")
    silu = _module("vllm.model_executor.layers.fused_moe.activation").MoEActivation.SILU
    shape, batch = problem.shape, problem.batch
    local, inter, hidden = shape.num_local_experts, shape.intermediate_size, shape.hidden_size
    config = config_of.FusedMoEConfig(
        num_experts=shape.num_experts,
        experts_per_token=shape.topk,
        hidden_dim=hidden,
        intermediate_size_per_partition=inter,
        num_local_experts=local,
        num_logical_experts=shape.num_experts,
        activation=silu,
        device="cuda",
        routing_method=config_of.RoutingMethodType.Default,
        moe_parallel_config=config_of.FusedMoEParallelConfig.make_no_parallel(),
        in_dtype=torch.bfloat16,
    )
    counts = problem.counts().int()
    told = modular.ExpertTokensMetadata(expert_num_tokens=counts, expert_num_tokens_cpu=counts.cpu())
    experts = kernels.DeepGemmExperts(config, _vllm_quantisation(problem))
    sizes = experts.workspace_shapes(problem.rows, 2 * inter, hidden, shape.topk, shape.num_experts, local, told, silu)
    first, second, output = (torch.empty(size, dtype=torch.bfloat16, device="cuda") for size in sizes)
    everyone = torch.arange(shape.num_experts, device="cuda")
    expert_map = torch.where(everyone < local, everyone, -1).int()

    def call() -> Tensor:
        experts.apply(
            output=output,
            hidden_states=batch.hidden,
            w1=problem.weights[0],
            w2=problem.weights[1],
            topk_weights=batch.weights,
            topk_ids=batch.ids,
            activation=silu,
            global_num_experts=shape.num_experts,
            expert_map=expert_map,
            a1q_scale=batch.scales,
            a2_scale=None,
            workspace13=first,
            workspace2=second,
            expert_tokens_meta=told,
            apply_router_weight_on_input=False,
        )
        return output

    return call


def deep_gemm_bf16(problem: Problem) -> Call:
    """Return DeepGEMM's two products on rows that lie in order beforehand; see `DeepGemmProducts`."""
    if problem.quantized is not None:
        message = "DeepGEMM's products alone are compared in bf16; in float8 vLLM's DeepGEMM experts are"
        raise Absent(message)
    return DeepGemmProducts(problem)


class DeepGemmProducts:
    """Two grouped products. A call also has the activation and the routes' sum; `work`, which is timed, has not."""

    def __init__(self, problem: Problem) -> None:
        """Lay the routes of each expert at multiples of DeepGEMM's alignment."""
        self._gemm = _deep_gemm()
        shape, batch, counts = problem.shape, problem.batch, problem.counts()
        local = shape.num_local_experts
        ids = batch.ids.view(-1)
        routes = int(counts.sum())
        order = torch.where(ids < local, ids, local).sort(stable=True)[1][:routes]
        expert = ids[order].long()
        align = self._gemm.get_mk_alignment_for_contiguous_layout()
        room = (counts + align - 1) // align * align
        within = torch.arange(routes, device=ids.device) - (counts.cumsum(0) - counts)[expert]
        self._place = (room.cumsum(0) - room)[expert] + within
        self._token, self._weight = order // shape.topk, batch.weights.view(-1)[order].unsqueeze(1)
        self._owner = torch.repeat_interleave(torch.arange(local, device=ids.device), room).int()
        self._w1, self._w2 = problem.weights
        total, double = int(room.sum()), self._w1.shape[1]
        self._rows = batch.hidden.new_zeros(total, shape.hidden_size)
        self._rows[self._place] = batch.hidden[self._token]
        self._both = batch.hidden.new_empty(total, double)
        self._activation = batch.hidden.new_zeros(total, double // 2)
        self._result = batch.hidden.new_empty(total, shape.hidden_size)
        self._sum = torch.zeros(problem.rows, shape.hidden_size, device=ids.device)

    def work(self) -> None:
        """Both products, the second of the last call's activation."""
        self._gemm.m_grouped_bf16_gemm_nt_contiguous(self._rows, self._w1, self._both, self._owner)
        self._gemm.m_grouped_bf16_gemm_nt_contiguous(self._activation, self._w2, self._result, self._owner)

    def __call__(self) -> Tensor:
        """Return each row's sum of its routes, float32."""
        self.work()
        gate, up = self._both.chunk(2, 1)
        self._activation.copy_(torch.nn.functional.silu(gate) * up)
        self.work()
        return torch.zeros_like(self._sum).index_add_(0, self._token, self._result[self._place].float() * self._weight)


def sglang_triton(problem: Problem) -> Call:
    """Return SGLang's Triton experts, which skip the ids of other ranks; they quantise bf16 rows in the call."""
    fused = _module("sglang.srt.layers.moe.moe_runner.triton_utils.fused_moe")
    ids = torch.where(problem.batch.ids < problem.shape.num_local_experts, problem.batch.ids, -1).int()
    narrow: dict[str, Any] = {}
    if problem.quantized is not None:
        first, second = problem.scales
        narrow = {"use_fp8_w8a8": True, "w1_scale": first, "w2_scale": second, "block_shape": [BLOCK, BLOCK]}
    return partial(
        fused.fused_experts_impl,
        problem.wide_rows(),
        *problem.weights,
        problem.batch.weights,
        ids,
        inplace=False,
        activation="silu",
        filter_expert=True,
        **narrow,
    )


PEERS: dict[str, Callable[[Problem], Call]] = {
    "vllm": vllm_triton,
    "vllm-deep-gemm": vllm_deep_gemm,
    "deep-gemm": deep_gemm_bf16,
    "sglang": sglang_triton,
}


def _vllm_quantisation(problem: Problem) -> Any:
    config = _module("vllm.model_executor.layers.fused_moe.config")
    if problem.quantized is None:
        return config.FUSED_MOE_UNQUANTIZED_CONFIG
    first, second = problem.scales
    return config.fp8_w8a8_moe_quant_config(w1_scale=first, w2_scale=second, block_shape=[BLOCK, BLOCK])


def _deep_gemm() -> Any:
    """Return DeepGEMM: the package itself, or the copy in vLLM."""
    try:
        return _module("deep_gemm")
    except Absent as alone:
        try:
            return _module("vllm.third_party.deep_gemm")
        except Absent as inside:
            message = f"{alone}; {inside}"
            raise Absent(message) from inside


def _module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except Exception as error:
        message = f"{name} cannot be imported ({type(error).__name__}: {error})"
        raise Absent(message) from error
