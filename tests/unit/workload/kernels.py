"""Dense kernels in float32: correct and wrong ways to compute the layer."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from distbench.workload.activation import activate
from distbench.workload.batch import TokenBatch
from distbench.workload.formula import Formula
from distbench.workload.inputs import Workload
from distbench.workload.quantize import dequantize, quantize_fp8_blocks
from tests.unit.workload.shapes import plan_of_workload

Activation = Callable[[Tensor], Tensor]


def _fast_reciprocal(gate: Tensor) -> Tensor:
    """Return gate / (1 + exp(-gate)) by a reciprocal that is off by 2**-20, but for what is 1."""
    total = 1 + torch.exp(-gate)
    return gate * torch.where(total == 1, 1.0, (1 / total) * (1 + 2.0**-20))


SILU: dict[str, Activation] = {
    "sigmoid": functional.silu,
    "exp": lambda gate: gate / (1 + torch.exp(-gate)),
    "exp2": lambda gate: gate / (1 + torch.exp2(-gate * math.log2(math.e))),
    "tanh": lambda gate: gate * (0.5 + 0.5 * torch.tanh(gate / 2)),
    "fast reciprocal": _fast_reciprocal,
    "error 2**-13": lambda gate: functional.silu(gate) * (1 + 2.0**-13),
    "error -2**-13": lambda gate: functional.silu(gate) * (1 - 2.0**-13),
}


class Kernel(NamedTuple):
    """Way to compute a layer. `stored` is bf16, float32 (one stage) or e4m3; options that change bits have a default.

    `blocks` K blocks of each product are taken in random order, and with `round_partials` added in bf16.
    """

    blocks: int = 1
    round_partials: bool = False
    gates_as: torch.dtype | None = None
    silu_as: torch.dtype | None = None
    silu: str = "sigmoid"
    weight: str = "stage 2"
    atomic: bool = False
    by_bf16: bool = True
    scales: str = "maximum"


VARIANTS: dict[str, Kernel] = {
    "plain": Kernel(),
    "K blocks": Kernel(blocks=5),
    "split-k": Kernel(blocks=4, round_partials=True),
    "many splits": Kernel(blocks=9, round_partials=True),
    "atomic": Kernel(atomic=True),
    "atomic split-k": Kernel(blocks=3, round_partials=True, atomic=True),
    "gates in bf16": Kernel(gates_as=torch.bfloat16),
    "gates in fp16": Kernel(gates_as=torch.float16),
    "silu in bf16": Kernel(silu_as=torch.bfloat16),
    "gates and silu in bf16": Kernel(gates_as=torch.bfloat16, silu_as=torch.bfloat16),
    "one stage": Kernel(by_bf16=False),
    "one stage, split": Kernel(by_bf16=False, blocks=6),
    "one stage, atomic": Kernel(by_bf16=False, atomic=True),
    "exp": Kernel(silu="exp"),
    "exp2": Kernel(silu="exp2"),
    "tanh": Kernel(silu="tanh"),
    "fast reciprocal": Kernel(silu="fast reciprocal"),
    "error": Kernel(silu="error 2**-13"),
    "error downwards": Kernel(silu="error -2**-13"),
    "error, silu in bf16": Kernel(silu="error 2**-13", silu_as=torch.bfloat16),
    "weight after the activation": Kernel(weight="stage 1"),
    "weight on the rounded row": Kernel(weight="row"),
    "scales by powers of two": Kernel(scales="power of two"),
    "no scales": Kernel(scales="none"),
    "everything": Kernel(
        blocks=3, round_partials=True, gates_as=torch.bfloat16, silu_as=torch.bfloat16, silu="exp2", atomic=True
    ),
}


class Layer(NamedTuple):
    """Dense weights in float32 of experts from `first` on, and how the intermediate is stored: None or an e4m3.

    `formula` is what kernels compute; variants of SiLU apply to the plain one alone.
    """

    w1: Tensor
    w2: Tensor
    first: int
    fp8: torch.dtype | None
    order: torch.Generator
    formula: Formula = Formula()
    biases: tuple[Tensor, Tensor] | None = None


class Fault(NamedTuple):
    """Deviations of a broken kernel."""

    activation: Activation | None = None
    weigh_gate: bool = False
    columns: Callable[[Tensor], Tensor] | None = None
    scales: Callable[[Tensor], Tensor] | None = None
    intermediate: Callable[[Tensor], Tensor] | None = None
    output: Callable[[Tensor], Tensor] | None = None


def layer_of(workload: Workload, ranks: range, *, seed: int = 0) -> Layer:
    parts = zip(*(workload.local_weights(rank) for rank in ranks), strict=True)
    w1, w2 = (torch.cat(part).float() for part in parts)
    plan = plan_of_workload(workload)
    fp8 = workload.fp8 if plan.intermediate == "e4m3" else None
    order = torch.Generator().manual_seed(seed)
    experts = torch.arange(ranks.start * workload.experts_per_rank, ranks.stop * workload.experts_per_rank)
    biases = workload.numerics.biases(experts)
    return Layer(w1, w2, ranks.start * workload.experts_per_rank, fp8, order, plan.formula, biases)


def run(kernel: Kernel, layer: Layer, batch: TokenBatch, fault: Fault | None = None) -> Tensor:
    """Weighted sum of each row's experts of `layer`, bf16 [n, H]."""
    fault = fault or Fault()
    hidden = dequantize(batch.hidden, batch.scales)
    total = torch.zeros_like(hidden)
    slots = torch.randperm(batch.ids.shape[1], generator=layer.order).tolist()
    for slot in slots:
        for expert in sorted(set(batch.ids[:, slot].tolist())):
            local = expert - layer.first
            if not 0 <= local < layer.w1.shape[0]:
                continue
            rows = (batch.ids[:, slot] == expert).nonzero().flatten()
            weights = batch.weights[rows, slot].unsqueeze(1)
            result = _expert(kernel, layer, hidden[rows], local, weights, fault)
            total[rows] += result.bfloat16().float()
            if kernel.atomic:
                total[rows] = total[rows].bfloat16().float()
    return total.bfloat16()


def _expert(  # noqa: C901, PLR0913 - a kernel's arguments
    kernel: Kernel, layer: Layer, hidden: Tensor, local: int, weights: Tensor, fault: Fault
) -> Tensor:
    w1, w2 = layer.w1[local], layer.w2[local]
    biases = None if layer.biases is None else (layer.biases[0][local], layer.biases[1][local])
    columns = fault.columns or (lambda weight: weight)
    first = _product(kernel, layer, hidden, columns(w1))
    if layer.formula.weigh_first:
        first, weights = first * weights, torch.ones_like(weights)
    gate, up = (first if biases is None else first + biases[0]).chunk(2, dim=1)
    if kernel.gates_as is not None:
        gate, up = gate.to(kernel.gates_as).float(), up.to(kernel.gates_as).float()
    if layer.formula == Formula():
        activation = (fault.activation or SILU[kernel.silu])(gate * weights if fault.weigh_gate else gate)
        if kernel.silu_as is not None:
            activation = activation.to(kernel.silu_as).float()
        activation = activation * up
    else:
        activation = activate(gate, up, layer.formula)
    if kernel.weight == "stage 1" and not fault.weigh_gate:
        activation = activation * weights
    if kernel.by_bf16:
        activation = activation.bfloat16().float()
    if layer.fp8 is not None:
        activation = _stored(kernel, activation, layer.fp8, fault)
    if fault.intermediate is not None:
        activation = fault.intermediate(activation)
    result = _product(kernel, layer, activation, w2)
    if biases is not None:
        result = result + biases[1]
    if fault.output is not None:
        result = fault.output(result)
    if fault.weigh_gate or kernel.weight == "stage 1":
        return result
    return result.bfloat16().float() * weights if kernel.weight == "row" else result * weights


def _stored(kernel: Kernel, values: Tensor, fp8: torch.dtype, fault: Fault) -> Tensor:
    """Values after a round trip through e4m3 with a scale per 128 values."""
    width = values.shape[1]
    padded = functional.pad(values, (0, -width % 128))
    if width % 128 or kernel.scales == "power of two":
        amax = padded.view(len(values), -1, 128).abs().amax(2).clamp(min=1e-30)
        scales = torch.exp2(torch.ceil(torch.log2(amax / torch.finfo(fp8).max)))
    elif kernel.scales == "none" and fp8 == torch.float8_e4m3fn:
        quantised, scales = values.clamp(-448, 448).to(fp8), torch.ones(len(values), width // 128)
        outside = values.abs() > 448
        return torch.where(outside, values, quantised.float())
    else:
        quantised, scales = quantize_fp8_blocks(padded.bfloat16() if kernel.by_bf16 else padded, fp8)
        return dequantize(quantised, fault.scales(scales) if fault.scales else scales)[:, :width]
    blocks = (padded.view(len(values), -1, 128) / scales.unsqueeze(2)).to(fp8).float()
    scales = fault.scales(scales) if fault.scales else scales
    return (blocks * scales.unsqueeze(2)).view(len(values), -1)[:, :width]


def _product(kernel: Kernel, layer: Layer, rows: Tensor, weight: Tensor) -> Tensor:
    if kernel.blocks == 1:
        return rows @ weight.t()
    total = rows.new_zeros(rows.shape[0], weight.shape[0])
    for columns in torch.randperm(rows.shape[1], generator=layer.order).tensor_split(kernel.blocks):
        total += rows[:, columns] @ weight[:, columns].t()
        if kernel.round_partials:
            total = total.bfloat16().float()
    return total
