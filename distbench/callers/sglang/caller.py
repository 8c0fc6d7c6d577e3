"""SGLang as the caller: its dispatcher over our transport, its cut, and its call of `aiter.fused_moe`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distbench.callers.base import Caller, CallerContext, Steps
from distbench.callers.fused_moe import WatchedFusedMoe
from distbench.callers.operator import MoriOperator, named
from distbench.callers.packages import PackageText, package_text
from distbench.callers.setting import Setting
from distbench.callers.sglang.lifted import Package, Sglang, kernel_type, load
from distbench.case.plugins import Plugin
from distbench.errors import InvalidCase
from distbench.experts.aiter.adapter import AiterExperts
from distbench.experts.base import ExpertWeights
from distbench.transport.base import Transport
from distbench.workload.batch import TokenBatch


class _Parts(NamedTuple):
    """The lifted code, and the parts of ours that it runs over."""

    sglang: Sglang
    dispatcher: Any
    core: Any
    experts: AiterExperts


class SglangCaller(Caller):
    """SGLang's lifted code for one rank; `fused_moe` is that of the package that `experts` use."""

    def __init__(self, text: PackageText, setting: Setting, experts: AiterExperts) -> None:
        """Lift the code and build its dispatcher and its runner.

        Raises:
            Unsupported: the release lacks a definition, or one needs something that is not provided here.

        """
        fused = WatchedFusedMoe(experts)
        self._op = op = SglangOperator(setting, fused)
        sglang = load(text, setting, _package(experts, fused, op))
        self.text = sglang.text
        with named(text.label):
            dispatcher, core = _dispatcher(sglang, setting, op), _runner(sglang, setting)
        self._parts = _Parts(sglang, dispatcher, core, experts)

    def run(self, batch: TokenBatch, weights: ExpertWeights, transport: Transport, steps: Steps) -> Tensor:
        """See `Caller.run`; the calls are those of SGLang's `FusedMoE.forward_impl`, in its order."""
        _, dispatcher, core, _ = self._parts
        runner = self._parts.sglang.runner
        state: dict[str, Any] = {}
        topk = SimpleNamespace(topk_weights=batch.weights, topk_ids=batch.ids)
        with self._op.layer(self.text.label, batch, weights, transport, steps):
            quant = _quant_info(self._parts, weights)
            sent = dispatcher.dispatch(batch.hidden.to(torch.bfloat16), topk)
            given = runner["_pre_permute_deepep_to_aiter"](sent, quant, core.config, state)
            made = core.run(given, quant, state)
            returned = runner["post_permute_aiter_to_deepep_normal"](made, quant, core.config, state)
            combined: Tensor = dispatcher.combine(returned)
        return combined


class SglangOperator(MoriOperator):
    """MoRI's operator as SGLang's dispatcher reads it: its kernel type, and the rows of its receive buffer."""

    def __init__(self, setting: Setting, fused: WatchedFusedMoe) -> None:
        super().__init__(fused)
        self.config = SimpleNamespace(kernel_type=kernel_type(setting.kernel))
        self._capacity = setting.case.capacity

    def max_num_tokens_to_recv(self) -> int:
        """Rows of the receive buffer."""
        return self._capacity


def _dispatcher(sglang: Sglang, setting: Setting, op: MoriOperator) -> Any:
    """SGLang's dispatcher of normal mode, with our operator in place of the one that it would build."""
    case, names = setting.case, sglang.dispatcher
    dispatcher = names["MoriEPDispatcher"](
        group=None,
        router_topk=case.topk_slots,
        num_experts=case.placed_experts,
        num_local_experts=case.experts_per_rank,
        hidden_size=case.hidden_size,
        params_dtype=torch.bfloat16,
        deepep_mode=names["DeepEPMode"].NORMAL,
    )
    dispatcher._normal_dispatcher._mori_op = op  # noqa: SLF001 - SGLang builds it lazily, over a group of its own
    fp8 = case.dispatch_dtype == "fp8"
    dispatcher.set_quant_config({"weight_dtype": names["fp8_dtype"] if fp8 else torch.bfloat16})
    return dispatcher


def _runner(sglang: Sglang, setting: Setting) -> Any:
    case = setting.case
    config = sglang.base["MoeRunnerConfig"](
        num_experts=case.placed_experts,
        num_local_experts=case.experts_per_rank,
        hidden_size=case.hidden_size,
        intermediate_size_per_partition=case.intermediate_size,
        top_k=case.topk_slots,
        params_dtype=torch.bfloat16,
    )
    return sglang.runner["AiterRunnerCore"](config)


def _package(experts: AiterExperts, fused: WatchedFusedMoe, op: MoriOperator) -> Package:
    package = experts.package
    return Package(package.root, str(package.chip.get_gfx()), fused.fused_moe, op.quantizer)


def _quant_info(parts: _Parts, weights: ExpertWeights) -> Any:
    """What SGLang's quantisation method hands to its runner: weights in aiter's layout, and the dispatcher's mask."""
    layer, names = parts.experts.prepared(weights), parts.sglang.runner
    kinds = names["AiterQuantType"]
    return names["AiterMoeQuantInfo"](
        w13_weight=layer.w1,
        w2_weight=layer.w2,
        quant_type=kinds.NONE if layer.w1_scale is None else kinds.PER_128X128,
        w13_scale=layer.w1_scale,
        w2_scale=layer.w2_scale,
        expert_mask=parts.dispatcher.expert_mask_gpu,
    )


def make(context: CallerContext) -> SglangCaller:
    """Return the caller of a rank.

    Raises:
        InvalidCase: the case follows the rules of another release.
    """
    case = context.setting.case
    text = package_text(case)
    if case.sglang_version not in ("", text.version):
        message = (
            f"sglang_version = {case.sglang_version}: the caller is {text.label}; give that version, or drop the key"
        )
        raise InvalidCase(message)
    return SglangCaller(text, context.setting, context.experts)


PLUGIN = Plugin(make=make, name="sglang")
