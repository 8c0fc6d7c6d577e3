"""SGLang as the caller: its dispatcher over our transport, its cut, and its call of `aiter.fused_moe`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from distbench.callers.base import Call, Caller, CallerPass, Check
from distbench.callers.fused_moe import WatchedFusedMoe
from distbench.callers.packages import PackageText
from distbench.callers.setting import Setting
from distbench.callers.sglang.lifted import Package, Sglang, kernel_type, load
from distbench.errors import DistbenchError, InvalidCase, Unsupported
from distbench.experts.aiter.adapter import AiterExperts
from distbench.experts.base import ExpertWeights
from distbench.transport.base import Dispatched, Transport
from distbench.utils.text import one_line
from distbench.workload.batch import TokenBatch


class _Parts(NamedTuple):
    """The lifted code, and the parts of ours that it runs over."""

    sglang: Sglang
    dispatcher: Any
    core: Any
    op: MoriOperator
    fused: WatchedFusedMoe
    experts: AiterExperts


class SglangCaller(Caller):
    """SGLang's lifted code for one rank; `fused_moe` is that of the package that `experts` use."""

    def __init__(self, text: PackageText, setting: Setting, experts: AiterExperts) -> None:
        """Lift the code and build its dispatcher and its runner.

        Raises:
            Unsupported: the release lacks a definition, or one needs something that is not provided here.

        """
        op, fused = MoriOperator(setting), WatchedFusedMoe(experts)
        sglang = load(text, setting, _package(experts, fused, op))
        self.text = sglang.text
        with _named(text.label):
            dispatcher, core = _dispatcher(sglang, setting, op), _runner(sglang, setting)
        self._parts = _Parts(sglang, dispatcher, core, op, fused, experts)

    def start(self, batch: TokenBatch, weights: ExpertWeights, transport: Transport) -> CallerPass:
        """See `Caller.start`."""
        self._parts.op.begin(batch, transport)
        return _Pass(self._parts, batch, weights)


class MoriOperator:
    """MoRI's operator as SGLang's dispatcher calls it, over the transport of the pass under way."""

    def __init__(self, setting: Setting) -> None:
        self.config = SimpleNamespace(kernel_type=kernel_type(setting.kernel))
        self._capacity = setting.case.capacity
        self._batch: TokenBatch | None = None
        self._transport: Transport | None = None
        self.dispatched: Dispatched | None = None

    def begin(self, batch: TokenBatch, transport: Transport) -> None:
        """Take the next pass's tokens and transport."""
        self._batch, self._transport = batch, transport

    def max_num_tokens_to_recv(self) -> int:
        """Rows of the receive buffer."""
        return self._capacity

    def dispatch(
        self,
        rows: Tensor,
        weights: Tensor,
        scales: Tensor | None,
        ids: Tensor,
        call_local_expert_count: bool = False,  # noqa: FBT001, FBT002 - MoRI's signature
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Send rows: hidden, weights, scales, ids and total_recv of the receive buffer."""
        assert self._transport is not None  # noqa: S101 - `begin` comes first
        assert not call_local_expert_count  # noqa: S101 - no recorder asks for it
        self.dispatched = got = self._transport.dispatch(TokenBatch(rows, scales, weights, ids))
        return got.hidden, got.weights, got.scales, got.ids, got.total_recv

    def combine(self, rows: Tensor, weights: None, ids: Tensor) -> tuple[Tensor, None]:
        """Return expert rows to their senders."""
        assert self._transport is not None  # noqa: S101
        return self._transport.combine(rows, ids), weights

    def quantizer(self, quant_type: Any) -> Callable[..., tuple[Tensor, Tensor]]:
        """The sender's quantiser: the workload's own rows, which are quantised already."""

        def quantize(rows: Tensor, quant_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
            batch = self._batch
            assert batch is not None and batch.scales is not None  # noqa: S101, PT018
            if quant_type.name != "per_1x128" or batch.hidden.dtype != quant_dtype or rows.shape != batch.hidden.shape:
                message = f"the sender quantises {list(rows.shape)} rows to {quant_dtype} by {quant_type.name}"
                raise DistbenchError(message)
            return batch.hidden, batch.scales

        return quantize


class _Pass(CallerPass):
    """The calls of one layer, in the order of SGLang's `FusedMoE.forward_impl`."""

    def __init__(self, parts: _Parts, batch: TokenBatch, weights: ExpertWeights) -> None:
        self._parts = parts
        self._batch = batch
        self._weights = weights
        self._quant = _quant_info(parts, weights)
        self._state: dict[str, Any] = {}
        self._values: Any = None

    def dispatch(self) -> Dispatched:
        """See `CallerPass.dispatch`."""
        batch, op = self._batch, self._parts.op
        topk = SimpleNamespace(topk_weights=batch.weights, topk_ids=batch.ids)
        with self._named():
            self._values = self._parts.dispatcher.dispatch(batch.hidden.to(torch.bfloat16), topk)
        assert op.dispatched is not None  # noqa: S101
        return op.dispatched

    def cut(self) -> None:
        """See `CallerPass.cut`."""
        permute = self._parts.sglang.runner["_pre_permute_deepep_to_aiter"]
        with self._named():
            self._values = permute(self._values, self._quant, self._parts.core.config, self._state)

    def experts(self, check: Check | None) -> Call:
        """See `CallerPass.experts`."""
        permute = self._parts.sglang.runner["post_permute_aiter_to_deepep_normal"]
        with self._named(), self._parts.fused.watching(self._weights, check) as watch:
            output = self._parts.core.run(self._values, self._quant, self._state)
            self._values = permute(output, self._quant, self._parts.core.config, self._state)
        return watch.call(self._values.hidden_states)

    def combine(self) -> Tensor:
        """See `CallerPass.combine`."""
        with self._named():
            combined: Tensor = self._parts.dispatcher.combine(self._values)
        return combined

    def _named(self) -> Any:
        return _named(self._parts.sglang.text.label)


@contextmanager
def _named(label: str) -> Iterator[None]:
    """Errors in a pass of lifted code, also those that reach it from the transport or the kernels, name its release."""
    try:
        yield
    except (InvalidCase, Unsupported):
        raise
    except Exception as error:
        kind = "" if isinstance(error, DistbenchError) else f"{type(error).__name__}: "
        message = f"{kind}{one_line(error)} (in a pass of production, {label})"
        raise DistbenchError(message) from error


def _dispatcher(sglang: Sglang, setting: Setting, op: MoriOperator) -> Any:
    """SGLang's dispatcher of normal mode, with our operator in place of the one that it would build."""
    case, names = setting.case, sglang.dispatcher
    dispatcher = names["MoriEPDispatcher"](
        group=None,
        router_topk=case.topk,
        num_experts=case.num_experts,
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
        num_experts=case.num_experts,
        num_local_experts=case.experts_per_rank,
        hidden_size=case.hidden_size,
        intermediate_size_per_partition=case.intermediate_size,
        top_k=case.topk,
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
