"""Mutants of what an argument of `fused_moe` asks for: activation, limit, bias, the stage that weighs, padding."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from distbench.experts.blocked_matmul import Weights
from distbench.experts.selection.choice import KernelChoice
from distbench.experts.steps import Group
from distbench.faults.mutants.corpus import Class, Site

ARGUMENTS = Class("arguments", "gpt-oss")
_at = ARGUMENTS.at


@_at("activate", "gelu")
def silu_for_gelu(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Silu where gelu is asked for."""
    return functional.silu(gate) * up


@_at("activate", "gelu")
def tanh_for_erf(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Gelu by tanh where gelu by erf is asked for."""
    return functional.gelu(gate, approximate="tanh") * up


@_at("activate", "gelu", touches="elements")
def silu_in_the_last_column(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """The last intermediate column has silu where gelu is asked for."""
    made = site.right(gate, up)
    made[..., -1] = functional.silu(gate[..., -1]) * up[..., -1]
    return made


@_at("activate", bug="aiter 0.1.7: CK's two stages compute gelu for Swiglu")
def gelu_for_swiglu(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Gelu where swiglu is asked for."""
    return functional.gelu(gate) * up


@_at("activate")
def alpha_left_out(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Swiglu with an alpha of 1."""
    return functional.silu(gate.clamp(max=7)) * (up.clamp(-7, 7) + 1)


@_at("activate")
def one_not_added_to_up(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Swiglu without the 1 that it adds to up."""
    gate = gate.clamp(max=7)
    return gate * torch.sigmoid(1.702 * gate) * up.clamp(-7, 7)


@_at("activate")
def swiglu_without_its_limit(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Swiglu clamps nothing."""
    return gate * torch.sigmoid(1.702 * gate) * (up + 1)


@_at("activate", "limit", bug="aiter 0.1.20: kernels for bf16 rows do not read swiglu_limit")
def limit_left_out(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """The limit is not applied."""
    return functional.silu(gate) * up


@_at("activate", "limit")
def limit_on_the_gate_alone(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Up is not clamped."""
    return functional.silu(gate.clamp(max=site.case.swiglu_limit)) * up


@_at("activate", "limit")
def limit_on_up_from_above_alone(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Up is not clamped from below."""
    limit = site.case.swiglu_limit
    return functional.silu(gate.clamp(max=limit)) * up.clamp(max=limit)


@_at("bias", "gpt-oss", "bias fp8", bug="aiter 0.1.20: kernels for bf16 rows do not read bias1 and bias2")
def biases_left_out(site: Site, rows: Tensor, bias: Tensor, group: Group) -> Tensor:
    """No bias is added."""
    return rows


@_at("bias", "gpt-oss", "bias fp8")
def first_bias_left_out(site: Site, rows: Tensor, bias: Tensor, group: Group) -> Tensor:
    """Bias1 is not added."""
    return rows if bias.shape[1] == 2 * site.case.intermediate_size else site.right(rows, bias, group)


@_at("bias", "gpt-oss", "bias fp8")
def second_bias_left_out(site: Site, rows: Tensor, bias: Tensor, group: Group) -> Tensor:
    """Bias2 is not added."""
    return rows if bias.shape[1] == site.case.hidden_size else site.right(rows, bias, group)


@_at("bias", "gpt-oss", "bias fp8", bug="aiter 3208: the bias is indexed by the global expert id")
def bias_of_the_next_expert(site: Site, rows: Tensor, bias: Tensor, group: Group) -> Tensor:
    """Biases of the next expert are added."""
    return site.right(rows, bias.roll(-1, 0), group)


@_at("bias", "gpt-oss", "bias fp8")
def bias_added_twice(site: Site, rows: Tensor, bias: Tensor, group: Group) -> Tensor:
    """Biases are added twice, as by two parts of split-k."""
    return site.right(rows, bias + bias, group)


@_at("bias", "gpt-oss", "bias fp8")
def bias_subtracted(site: Site, rows: Tensor, bias: Tensor, group: Group) -> Tensor:
    """Biases have the wrong sign."""
    return site.right(rows, -bias, group)


@_at(
    "bias",
    "gpt-oss",
    "bias fp8",
    unseen="e4m3 rounds the intermediate by more than bf16 rounds a bias; in bf16 gaussian inputs show it",
)
def bias_in_bf16(site: Site, rows: Tensor, bias: Tensor, group: Group) -> Tensor:
    """Biases are rounded to bf16."""
    return site.right(rows, bias.bfloat16().float(), group)


@_at("bias", "gpt-oss", "bias fp8", touches="elements")
def bias_of_the_first_column_lost(site: Site, rows: Tensor, bias: Tensor, group: Group) -> Tensor:
    """The first column has no bias."""
    made = site.right(rows, bias, group)
    made[..., 0] = rows[..., 0]
    return made


@_at("bias", "gpt-oss", "bias fp8", touches="row")
def bias_of_one_row_lost(site: Site, rows: Tensor, bias: Tensor, group: Group) -> Tensor:
    """One row in 64 has no bias."""
    return torch.where(site.rare_in(group), rows, site.right(rows, bias, group))


@_at("weigh", "weights first")
def weights_in_no_stage(site: Site, rows: Tensor, weights: Tensor, group: Group) -> Tensor:
    """Stage 1 is to weigh, and neither stage does."""
    return rows


@_at("weigh", "weights first")
def weights_on_the_gate_alone(site: Site, rows: Tensor, weights: Tensor, group: Group) -> Tensor:
    """Stage 1 weighs the gate and not up."""
    gate, up = rows.chunk(2, dim=2)
    return torch.cat([site.right(gate, weights, group), up], dim=2)


@_at("weigh", "weights first")
def weights_after_the_activation(site: Site, rows: Tensor, weights: Tensor, group: Group) -> Tensor:
    """Stage 1 weighs what the activation gives, not gate and up."""
    gate, up = rows.chunk(2, dim=2)
    return torch.cat([gate, site.right(up, weights, group)], dim=2)


@_at("weigh", "weights first")
def weights_twice_in_stage_1(site: Site, rows: Tensor, weights: Tensor, group: Group) -> Tensor:
    """Stage 1 weighs twice."""
    return site.right(rows, weights.square(), group)


@_at("first", touches="elements", bug="aiter 3117, 3344: padding lanes of K are left uninitialised")
def stale_hidden_padding(site: Site, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The last column of hidden padding holds 1 where stage 1 reads it."""
    stale = rows.clone()
    stale[..., -1] = 1
    return site.right(stale, w1, group, choice)


@_at("second", touches="elements", bug="aiter 3117, 3344: padding lanes of K are left uninitialised")
def stale_intermediate_padding(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The last column of intermediate padding holds 1 where stage 2 reads it."""
    stale = rows.clone()
    stale[..., -1] = 1
    return site.right(stale, w2, group, choice)


@_at("second", touches="elements")
def output_padding_written(site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The last column of the output's padding is not zero."""
    made = site.right(rows, w2, group, choice)
    made[..., -1] = 1
    return made


@_at("first")
def hidden_padding_rounded_up(site: Site, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """A tile too much counts as padding of hidden states: 64 columns are lost."""
    fewer = rows.clone()
    fewer[..., -site.case.hidden_pad - 64 :] = 0
    return site.right(fewer, w1, group, choice)


@_at("second")
def intermediate_padding_rounded_up(
    site: Site, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice
) -> Tensor:
    """A tile too much counts as padding of the intermediate: 64 columns are lost."""
    fewer = rows.clone()
    fewer[..., -site.case.intermediate_pad - 64 :] = 0
    return site.right(fewer, w2, group, choice)
