"""ATOM as the caller: its modular kernel over our transport, its cut, and its call of `aiter.fused_moe`."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from distbench.callers.atom.lifted import Package, load
from distbench.callers.base import Caller, CallerContext, Steps
from distbench.callers.fused_moe import WatchedFusedMoe
from distbench.callers.operator import MoriOperator, named
from distbench.callers.packages import PackageText, package_text
from distbench.callers.setting import Setting
from distbench.case.plugins import Plugin
from distbench.experts.aiter.adapter import AiterExperts
from distbench.experts.base import ExpertWeights
from distbench.transport.base import Transport
from distbench.workload.batch import TokenBatch
from distbench.workload.quantize import fp8_dtype


class AtomCaller(Caller):
    """ATOM's lifted code for one rank; `fused_moe` is that of the package that `experts` use."""

    def __init__(self, text: PackageText, setting: Setting, experts: AiterExperts) -> None:
        """Lift the code and build its kernel.

        Raises:
            Unsupported: the text lacks a definition, or one needs something that is not provided here.

        """
        case, root = setting.case, experts.package.root
        fused = WatchedFusedMoe(experts)
        self._op = op = MoriOperator(fused)
        units = int(experts.package.chip.get_cu_num())
        atom = load(text, setting, Package(root, units, fused.fused_moe, op.quantizer))
        self.text = atom.text
        self._case, self._experts = case, experts
        fp8 = case.dispatch_dtype == "fp8"
        self._quant_type = root.QuantType.per_1x128 if fp8 else root.QuantType.No
        with named(text.label):
            dtype = fp8_dtype(case.fp8_format) if fp8 else torch.bfloat16
            prepare_finalize = atom.prepare_finalize(
                op,
                max_tokens_per_rank=case.max_dispatch_tokens_per_rank,
                num_dispatchers=case.ep_size,
                dispatch_format=atom.dispatch_format(in_dtype=dtype, hidden_dim=case.hidden_size),
            )
            self._kernel: Any = atom.kernel(prepare_finalize, quant_config=SimpleNamespace())

    def run(self, batch: TokenBatch, weights: ExpertWeights, transport: Transport, steps: Steps) -> Tensor:
        """See `Caller.run`."""
        layer = self._experts.prepared(weights)
        with self._op.layer(self.text.label, batch, weights, transport, steps):
            combined: Tensor = self._kernel.forward(
                hidden_states=batch.hidden.to(torch.bfloat16),
                w1=layer.w1,
                w2=layer.w2,
                topk_weights=batch.weights,
                topk_ids=batch.ids,
                quant_type=self._quant_type,
                global_num_experts=self._case.placed_experts,
                expert_mask=weights.mask,
                w1_scale=layer.w1_scale,
                w2_scale=layer.w2_scale,
            )
        return combined


def make(context: CallerContext) -> AtomCaller:
    """Return the caller of a rank."""
    case = context.setting.case
    text = package_text(case)
    return AtomCaller(text, context.setting, context.experts)


PLUGIN = Plugin(make=make, name="atom")
