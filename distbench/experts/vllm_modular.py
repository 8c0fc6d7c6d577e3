"""Experts of vLLM: `TritonExperts` or `DeepGemmExperts`, its modular experts, called as its expert parallelism does.

Rounding points are those of vLLM 0.22.1, by its text: modules triton_moe and deep_gemm_moe of its experts,
and the sources activation_kernels.cu, moe_align_sum_kernels.cu and fused_silu_mul_block_quant.cu of its kernels.
"""

from __future__ import annotations

from functools import partial
from typing import Any, Literal, NamedTuple

import msgspec
import torch
from torch import Tensor

from distbench.case.plugins import Plugin
from distbench.case.spec import Case
from distbench.errors import Unsupported
from distbench.experts.base import ExpertInput, Experts, ExpertsContext, ExpertWeights
from distbench.experts.formulas import formula_of
from distbench.experts.guest import check_guest_layer, live_ids, tile_name
from distbench.experts.quantized_weights import QuantizedWeights
from distbench.experts.roundings import Roundings
from distbench.experts.selection.choice import KernelChoice
from distbench.utils.text import one_line
from distbench.workload.exact_plan import BLOCK

Kernel = Literal["TritonExperts", "DeepGemmExperts"]
_GATHER_COLUMNS = 1024
"""Columns at a time of the kernel by which DeepGemmExperts add up routes; a wider layer is whole multiples of it."""
_BF16_SUMS = range(2, 5)
"""top-k for which `moe_sum` has a kernel of its own, which adds in bf16; others are added by torch, in float32."""


class Options(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Options of experts vllm."""

    kernel: Kernel = "TritonExperts"


class _Package(NamedTuple):
    """Names of vLLM that the experts use."""

    kernel: Any
    config: Any
    parallel: Any
    routing: Any
    plain: Any
    fp8: Any
    silu: Any
    tiles: Any
    scales_are_powers: bool
    version: str


class VllmExperts(Experts):
    """One of vLLM's modular experts. A call waits for no device.

    Rows that are not live are given an expert that no rank has, as are ids of no expert: vLLM's map of experts has one
    more for it.
    """

    def __init__(self, case: Case, kernel: Kernel) -> None:
        """Import vLLM.

        Raises:
            Unsupported: it is not installed, is a release with another interface, or does not compute the layer.
        """
        check_guest_layer(case, "vllm")
        _check_kernel(case, kernel)
        self._case, self._kernel = case, kernel
        self._fp8 = case.dispatch_dtype == "fp8"
        self._vllm = _package(kernel)
        self._weights = QuantizedWeights()
        self._made: tuple[Tensor, Any] | None = None
        self._map: Tensor | None = None

    def selection(self, rows: int) -> KernelChoice:
        """See `Experts.selection`; DeepGEMM chooses its tiles itself, by the number of rows."""
        name = f"vllm {self._kernel}"
        if self._kernel == "DeepGemmExperts":
            return KernelChoice.named(rows, f"{name} for {rows} rows")
        return KernelChoice.named(rows, f"{name} {tile_name(self._tiles(rows))}")

    def roundings(self, choice: KernelChoice) -> Roundings:  # noqa: ARG002 - those of a kernel hold for any rows
        """See `Experts.roundings`."""
        deep_gemm = self._kernel == "DeepGemmExperts"
        own_sum = not deep_gemm and self._case.topk_slots in _BF16_SUMS
        plain = Roundings(bf16_products=True, formula=formula_of(self._case), sums="bf16" if own_sum else "float32")
        if not self._fp8:
            return msgspec.structs.replace(plain, bf16_activation=True)
        through_bf16 = deep_gemm or self._vllm.scales_are_powers  # else one kernel activates and quantises
        return msgspec.structs.replace(
            plain,
            weights="e4m3fn",
            bf16_activation=through_bf16,
            bf16_intermediate=through_bf16,
            intermediate="e4m3fn",
            scales="power of two" if self._vllm.scales_are_powers else "maximum",
        )

    def about(self) -> dict[str, Any]:
        """See `Experts.about`."""
        return {"vllm": {"version": self._vllm.version, "experts": self._kernel}}

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        """See `Experts.__call__`."""
        output = weights.w2.new_empty(given.rows, weights.w2.shape[1])
        if not given.rows:
            return output
        experts, w1, w2 = self._experts(weights)
        shape = partial(experts.workspace_shapes, expert_tokens_meta=None, activation=self._vllm.silu)
        everyone, topk = self._case.placed_experts + 1, given.ids.shape[1]
        first, second, _ = shape(
            M=given.rows,
            N=w1.shape[1],
            K=w2.shape[1],
            topk=topk,
            global_num_experts=everyone,
            local_num_experts=len(w1),
        )
        experts.apply(
            output=output,
            hidden_states=given.hidden,
            w1=w1,
            w2=w2,
            topk_weights=given.weights,
            topk_ids=live_ids(given, self._case.placed_experts, absent=everyone - 1),
            activation=self._vllm.silu,
            global_num_experts=everyone,
            expert_map=self._expert_map(weights.mask),
            a1q_scale=given.scales,
            a2_scale=None,
            workspace13=output.new_empty(first),
            workspace2=output.new_empty(second),
            expert_tokens_meta=None,
            apply_router_weight_on_input=False,
        )
        return output

    def _experts(self, weights: ExpertWeights) -> tuple[Any, Tensor, Tensor]:
        """Return vLLM's object for these weights, and the weights as it takes them."""
        held = self._weights.of(weights.w1, weights.w2) if self._fp8 else None
        w1, w2 = (weights.w1, weights.w2) if held is None else (held.w1, held.w2)
        if self._made is None or self._made[0] is not w1:
            quant = self._vllm.plain
            if held is not None:
                scales = {"w1_scale": held.joined_scales1, "w2_scale": held.scales2}
                quant = self._vllm.fp8(**scales, block_shape=[BLOCK, BLOCK])
            self._made = w1, self._vllm.kernel(self._layer(w1.device), quant)
        return self._made[1], w1, w2

    def _layer(self, device: torch.device) -> Any:
        """Return vLLM's description of the layer on this rank; the columns of an expert have two names by release."""
        case, columns = self._case, "intermediate_size_per_partition"
        if "intermediate_size" in self._vllm.config.__dataclass_fields__:
            columns = "intermediate_size"
        return self._vllm.config(
            num_experts=case.placed_experts + 1,
            experts_per_token=case.topk_slots,
            hidden_dim=case.hidden_size,
            num_local_experts=case.experts_per_rank,
            num_logical_experts=case.placed_experts + 1,
            activation=self._vllm.silu,
            device=device,
            routing_method=self._vllm.routing.Default,
            moe_parallel_config=self._vllm.parallel.make_no_parallel(),
            in_dtype=torch.bfloat16,
            **{columns: case.intermediate_size},
        )

    def _tiles(self, rows: int) -> dict[str, int]:
        case = self._case
        local, hidden, columns = case.experts_per_rank, case.hidden_size, case.intermediate_size
        found: dict[str, int] = self._vllm.tiles(
            (local, 2 * columns, hidden),
            (local, hidden, columns),
            case.topk_slots,
            "fp8_w8a8" if self._fp8 else None,
            rows,
            block_shape=[BLOCK, BLOCK] if self._fp8 else None,
        )
        return found

    def _expert_map(self, mask: Tensor) -> Tensor:
        """Return the local number of each expert, int32 [E + 1]: -1 for those of other ranks, and for the last."""
        if self._map is None:
            self._map = torch.full((len(mask) + 1,), -1, dtype=torch.int32, device=mask.device)
            self._map[:-1] = torch.where(mask == 1, mask.cumsum(0) - 1, -1).int()
        return self._map


def _check_kernel(case: Case, kernel: Kernel) -> None:
    if kernel == "TritonExperts":
        return
    hidden, columns = case.hidden_size, case.intermediate_size
    lacks = {
        f"dispatch_dtype = {case.dispatch_dtype}": case.dispatch_dtype != "fp8",
        f"hidden_size = {hidden}": bool(hidden % BLOCK or hidden % min(hidden, _GATHER_COLUMNS)),
        f"intermediate_size = {columns}": bool(columns % BLOCK),
    }
    for what, lacking in lacks.items():
        if lacking:
            message = (
                f"experts vllm: {what}: DeepGemmExperts take fp8 rows, multiples of {BLOCK} columns, and of "
                f"{_GATHER_COLUMNS} hidden ones above that; use --experts-option kernel=TritonExperts"
            )
            raise Unsupported(message)


def _package(kernel: Kernel) -> _Package:
    try:
        import vllm
        from vllm.model_executor.layers.fused_moe import config, fused_moe
        from vllm.model_executor.layers.fused_moe.activation import MoEActivation
        from vllm.model_executor.layers.fused_moe.experts import deep_gemm_moe, triton_moe
        from vllm.utils import deep_gemm

        if kernel == "DeepGemmExperts" and not deep_gemm.is_deep_gemm_supported():
            message = "experts vllm: DeepGEMM is missing, or does not support this device (Hopper and Blackwell do)"
            raise Unsupported(message)
        return _Package(
            kernel=triton_moe.TritonExperts if kernel == "TritonExperts" else deep_gemm_moe.DeepGemmExperts,
            config=config.FusedMoEConfig,
            parallel=config.FusedMoEParallelConfig,
            routing=config.RoutingMethodType,
            plain=config.FUSED_MOE_UNQUANTIZED_CONFIG,
            fp8=config.fp8_w8a8_moe_quant_config,
            silu=MoEActivation.SILU,
            tiles=fused_moe.try_get_optimal_moe_config,
            scales_are_powers=bool(deep_gemm.is_deep_gemm_e8m0_used()),
            version=str(vllm.__version__),
        )
    except (ImportError, AttributeError) as error:
        message = f"experts vllm: {one_line(error)}; install a vllm of 0.22 or later beside its torch (docs/plugins.md)"
        raise Unsupported(message) from error


def make(context: ExpertsContext) -> VllmExperts:
    """Return the experts of a case."""
    return VllmExperts(context.case, context.options.kernel)


PLUGIN = Plugin(make=make, name="vllm", devices=("cuda",), graphs=True, options=Options)
