"""`fused_moe` with aiter's names, selection rules and log line, computed like `ReferenceExperts`.

Unchecked like the kernels: weights are read as shuffled, ids as int32, bytes as the device's fp8, and an id of no
expert is an access out of bounds.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from distbench.experts.aiter.emulated import quirks
from distbench.experts.aiter.emulated.enums import ActivationType, QuantType
from distbench.experts.aiter.emulated.ops.shuffle import unshuffled
from distbench.experts.aiter.emulated.utility.dtypes import get_dtype_fp8
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.experts.reference import ReferenceExperts
from distbench.experts.selection.choice import KernelSelector
from distbench.experts.selection.heuristics import LayerKey, block_rows
from distbench.experts.selection.releases import padded_rows
from distbench.experts.selection.tuned_table import TunedKey, load_tuned_rows
from distbench.workload.formula import Activation, Formula

logger = logging.getLogger("aiter")
quant_remap = {QuantType.per_128x128: QuantType.per_1x128}

_ACTIVATIONS: dict[ActivationType, Activation] = {
    ActivationType.Silu: "silu",
    ActivationType.Gelu: "gelu",
    ActivationType.Swiglu: "swiglu",
}
_BLOCK = 128
_FAULTY_ROWS = (304, 336)
_FAULTY_BUCKET = 4
_MOSTLY_PADDING = 16
_WEIGHTS_OF_A_LAYER = 2


@dataclass
class MOEMetadata:
    """Kernels of a bucket; `stage1` and `stage2` hold their names as keywords."""

    stage1: Callable[..., Any]
    stage2: Callable[..., Any] | None
    block_m: int
    ksplit: int
    run_1stage: bool = False


def fused_moe(  # noqa: PLR0913 - aiter's signature
    hidden_states: Tensor,
    w1: Tensor,
    w2: Tensor,
    topk_weight: Tensor,
    topk_ids: Tensor,
    expert_mask: Tensor | None = None,
    activation: ActivationType = ActivationType.Silu,
    quant_type: QuantType = QuantType.No,
    doweight_stage1: bool = False,  # noqa: FBT001, FBT002
    w1_scale: Tensor | None = None,
    w2_scale: Tensor | None = None,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    block_size_M: int | None = None,  # noqa: N803
    num_local_tokens: Tensor | None = None,
    moe_sorting_dispatch_policy: int = 0,
    dtype: torch.dtype | None = None,
    hidden_pad: int = 0,
    intermediate_pad: int = 0,
    bias1: Tensor | None = None,
    bias2: Tensor | None = None,
    splitk: int = 0,
    swiglu_limit: float | None = None,
) -> Tensor:
    """Return [M, model_dim]; rows at and past num_local_tokens hold NaN. Valid until the next call.

    The last two parameters are of newer releases. Padding is computed, as CK's kernels do. Activation, limit and biases
    are computed for all types of weights, as aiter's torch reference does.
    """
    quant_type = quant_remap.get(quant_type, quant_type)
    unusual = (a2_scale, block_size_M, splitk)
    if activation not in _ACTIVATIONS or not all(one is None or one is False or one == 0 for one in unusual):
        message = f"fused_moe (emulated): {activation}, static scale, tile or split-k is not imitated"
        raise NotImplementedError(message)
    formula = Formula(
        activation=_ACTIVATIONS[activation],
        swiglu_limit=swiglu_limit or 0.0,
        weigh_first=doweight_stage1,
        bias=bias1 is not None or bias2 is not None,
    )
    if quant_type not in {QuantType.No, QuantType.per_1x128}:
        message = f"fused_moe (emulated): {quant_type} is not imitated; No and per_1x128 are"
        raise NotImplementedError(message)
    del moe_sorting_dispatch_policy  # the result is the same
    out_dtype = hidden_states.dtype if dtype is None else dtype
    assert out_dtype in {torch.float16, torch.bfloat16}, f"Fused_moe unsupported out dtype: {out_dtype}"  # noqa: S101
    assert topk_weight.dtype == torch.float32, f"topk_weights dtype {topk_weight.dtype} is not fp32"  # noqa: S101
    _warn_of_layout(w1, w2)
    mask = torch.ones(w1.shape[0], dtype=torch.int32, device=w1.device) if expert_mask is None else expert_mask
    rows = topk_ids.shape[0]
    get_2stage_cfgs(
        get_padded_M(rows),
        w2.shape[1],
        w2.shape[2],
        w1.shape[0],
        topk_ids.shape[1],
        out_dtype,
        w1.dtype,
        w1.dtype,
        quant_type,
        w1.shape[1] == 2 * w2.shape[2],
        activation,
        doweight_stage1,
        hidden_pad,
        intermediate_pad,
        bias1,
        bias2,
        is_ep=expert_mask is not None,
    )
    layer = _layer(w1, w2, topk_ids.shape[1], formula, is_ep=expert_mask is not None)
    _check_tiles(layer, rows)
    live = _live_rows(num_local_tokens, rows)
    ids = _as_int32(topk_ids)
    _check_ids(ids[:live], mask.numel())
    engine = _engine(layer, formula)
    given = ExpertInput(_as_fp8(hidden_states), a1_scale, topk_weight, ids, torch.tensor([live], dtype=torch.int32))
    biases = _float32(bias1), _float32(bias2)
    weights = ExpertWeights(_weights(w1, w1_scale), _weights(w2, w2_scale), mask, *biases)
    output = engine.compute(given, weights, out_dtype)
    return _with_quirks(output, live, engine)


def get_padded_M(M: int) -> int:  # noqa: N802, N803 - aiter's names
    """Return the bucket of a row count."""
    return padded_rows(M, quirks.assumed().rules)


def get_block_size_M(token: int, topk: int, expert: int, inter_dim: int) -> int:  # noqa: N802
    """Return the rows of a tile without a tuned row; top-k counts as given."""
    key = LayerKey(
        num_local_experts=expert,
        topk=topk,
        model_dim=_BLOCK,
        inter_dim=inter_dim,
        is_ep=False,
        cu_count=quirks.assumed().cu_count,
    )
    return block_rows(token, key, quirks.assumed().rules)


@functools.lru_cache(maxsize=1024)
def get_2stage_cfgs(  # noqa: PLR0913 - aiter's signature
    token: int,
    model_dim: int,
    inter_dim: int,
    expert: int,
    topk: int,
    dtype: torch.dtype,
    q_dtype_a: torch.dtype,
    q_dtype_w: torch.dtype,
    q_type: QuantType,
    use_g1u1: bool,  # noqa: FBT001
    activation: ActivationType,
    doweight_stage1: bool,  # noqa: FBT001
    hidden_pad: int,
    intermediate_pad: int,
    bias1: Tensor | None,
    bias2: Tensor | None,
    is_ep: bool = False,  # noqa: FBT001, FBT002
) -> MOEMetadata:
    """Return the kernels of the bucket `token`, and log them once."""
    del hidden_pad, intermediate_pad, bias1, bias2
    layer = LayerKey(
        num_local_experts=expert,
        topk=topk,
        model_dim=model_dim,
        inter_dim=inter_dim,
        quant="bf16" if q_type is QuantType.No else "fp8",
        activation=_ACTIVATIONS[activation],
        doweight_stage1=doweight_stage1,
        is_ep=is_ep,
        cu_count=quirks.assumed().cu_count,
    )
    choice, tuned = _selector(layer).choose(token), _selector(layer).tuned_row(token)
    kernelName1, kernelName2 = (tuned.kernel_name1, tuned.kernel_name2) if tuned else ("", "")  # noqa: N806
    key = (layer.cu_count, token, model_dim, inter_dim, expert, layer.lookup_topk(quirks.assumed().rules))
    key += (str(activation), str(dtype), str(q_dtype_a), str(q_dtype_w), str(q_type), use_g1u1, doweight_stage1)  # type: ignore[assignment]
    names = f"({kernelName1=}, {kernelName2=})" if tuned else "default"
    stages = "1stage" if choice.run_1stage else "2stage"
    logger.info("[fused_moe] using %s %s for %s ", stages, names, key)
    return MOEMetadata(
        functools.partial(_stage, kernelName=kernelName1),
        None if choice.run_1stage else functools.partial(_stage, kernelName=kernelName2),
        choice.block_m,
        choice.ksplit,
        choice.run_1stage,
    )


def _stage(**_: Any) -> None:
    message = "a stage's kernel (emulated) cannot be called apart; call fused_moe"
    raise NotImplementedError(message)


def _layer(w1: Tensor, w2: Tensor, topk: int, formula: Formula, *, is_ep: bool) -> LayerKey:
    quant: Literal["bf16", "fp8"] = "fp8" if w1.element_size() == 1 else "bf16"
    return LayerKey(
        num_local_experts=w1.shape[0],
        topk=topk,
        model_dim=w2.shape[1],
        inter_dim=w2.shape[2],
        quant=quant,
        activation=formula.activation,
        doweight_stage1=formula.weigh_first,
        is_ep=is_ep,
        cu_count=quirks.assumed().cu_count,
    )


@functools.lru_cache(maxsize=256)
def _selector(layer: LayerKey) -> KernelSelector:
    assumed = quirks.assumed()
    tuned = load_tuned_rows(assumed.table, TunedKey.for_layer(layer, assumed.rules)) if assumed.table else ()
    return KernelSelector(layer=layer, tuned=tuned, rules=assumed.rules, overrides=assumed.overrides)


@functools.lru_cache(maxsize=4)
def _engine(layer: LayerKey, formula: Formula) -> ReferenceExperts:
    return ReferenceExperts(_selector(layer), quirks.assumed().seed, "maximum", formula)


def _float32(bias: Tensor | None) -> Tensor | None:
    if bias is not None and bias.dtype != torch.float32:
        message = f"MoE bias must be fp32, got {bias.dtype}"
        raise TypeError(message)
    return bias


class _Plain:
    """The last weights of each shape as their kernel sees them; they must not be written to while in use."""

    def __init__(self) -> None:
        self._known: dict[torch.Size, tuple[Tensor, Tensor]] = {}

    def get(self, weights: Tensor, scale: Tensor | None) -> Tensor:
        """Return `weights` in row order, dequantised where they have a scale per 128 x 128 block."""
        known = self._known.get(weights.shape)
        if known is None or known[0] is not weights:
            known = (weights, _multiplied(_as_fp8(unshuffled(weights)), scale))
            self._known[weights.shape] = known
            self._known = dict(list(self._known.items())[-_WEIGHTS_OF_A_LAYER:])
        return known[1]

    def clear(self) -> None:
        """Drop all entries."""
        self._known.clear()


_plain = _Plain()
_weights = _plain.get
for _cache in (get_2stage_cfgs.cache_clear, _selector.cache_clear, _engine.cache_clear, _plain.clear):
    quirks.forget_with(_cache)


def _multiplied(weights: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return weights
    count, rows, columns = weights.shape
    blocks = weights.float().view(count, rows // _BLOCK, _BLOCK, columns // _BLOCK, _BLOCK)
    wide = blocks * scale.view(count, rows // _BLOCK, 1, columns // _BLOCK, 1)
    return wide.view(count, rows, columns)


def _check_tiles(layer: LayerKey, rows: int) -> None:
    if _selector(layer).choose(rows).unfit(layer.model_dim, layer.inter_dim):
        message = "wrong! device_gemm with the specified compilation parameters does not support this GEMM problem"
        raise RuntimeError(message)


def _warn_of_layout(w1: Tensor, w2: Tensor) -> None:
    if not (getattr(w1, "is_shuffled", False) or getattr(w2, "is_shuffled", False)):
        logger.warning("[fused_moe] weights are not marked as shuffled; the result may be incorrect")


def _live_rows(num_local_tokens: Tensor | None, rows: int) -> int:
    live = rows if num_local_tokens is None or quirks.has(quirks.ALL_ROWS) else int(num_local_tokens)
    if live > rows and quirks.has(quirks.PAST_ROWS_FAULT):
        quirks.fault(f"num_local_tokens is {live}, the input has {rows} rows: the sort writes out of bounds")
    if live and rows in _FAULTY_ROWS and quirks.has(quirks.FAULT_AT_ROWS):
        quirks.fault(f"a kernel for {rows} rows reads past its input")
    return min(live, rows)


def _as_fp8(rows: Tensor) -> Tensor:
    """Reinterpret bytes as the device's fp8, as kernels do, whatever their dtype says."""
    return rows.view(get_dtype_fp8()) if rows.element_size() == 1 else rows


def _as_int32(ids: Tensor) -> Tensor:
    """Reinterpret ids as int32, as the sort does, whatever their dtype."""
    if ids.dtype == torch.int32:
        return ids
    return ids.contiguous().view(torch.int32).flatten()[: ids.numel()].view(ids.shape)


def _check_ids(ids: Tensor, num_experts: int) -> None:
    wild = ids[(ids < 0) | (ids >= num_experts)]
    if wild.numel():
        quirks.fault(f"expert id {int(wild[0])}, the mask has {num_experts} experts")


def _with_quirks(output: Tensor, live: int, engine: ReferenceExperts) -> Tensor:
    choice = engine.selection(output.shape[0])
    valid = output[:live]
    if quirks.has(quirks.WRONG_BUCKET) and choice.bucket == _FAULTY_BUCKET:
        valid *= 2
    if quirks.has(quirks.UNSET_SPLIT_K) and choice.ksplit > 1:
        valid += 1
    if quirks.has(quirks.ZERO_ROWS) and output.shape[0] >= _MOSTLY_PADDING * live:
        valid.zero_()
    return output
