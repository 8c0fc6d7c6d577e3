"""Mutants of the activation, and of the path between gate and up."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

from distbench.experts.blocked_matmul import Weights
from distbench.experts.selection.choice import KernelChoice
from distbench.experts.steps import Group
from distbench.faults.mutants.corpus import Class, Site

ACTIVATION = Class("activation", "bf16", "fp8")
_at = ACTIVATION.at


@_at("activate")
def identity_for_silu(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """No activation: gate times up."""
    return gate * up


@_at("activate")
def relu_for_silu(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Relu instead of silu."""
    return gate.relu() * up


@_at("activate")
def gelu_for_silu(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Gelu (erf) instead of silu."""
    return functional.gelu(gate) * up


@_at("activate")
def gelu_tanh_for_silu(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Gelu (tanh) instead of silu."""
    return functional.gelu(gate, approximate="tanh") * up


@_at("activate")
def quick_gelu_for_silu(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """x sigmoid(1.702 x) instead of silu."""
    return gate * torch.sigmoid(1.702 * gate) * up


@_at("activate")
def hardswish_for_silu(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Hardswish instead of silu."""
    return functional.hardswish(gate) * up


@_at("activate")
def mish_for_silu(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Mish instead of silu."""
    return functional.mish(gate) * up


@_at("activate")
def silu_of_magnitude(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """The gate's sign is lost before silu."""
    return functional.silu(gate.abs()) * up


@_at("activate")
def sigmoid_for_silu(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Sigmoid instead of silu."""
    return torch.sigmoid(gate) * up


@_at("activate")
def silu_of_up(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Gate and up are exchanged: silu(up) times gate."""
    return functional.silu(up) * gate


@_at("activate")
def up_left_out(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) alone, without up."""
    return functional.silu(gate)


@_at("activate")
def silu_twice(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Silu of silu of the gate."""
    return functional.silu(functional.silu(gate)) * up


@_at("activate")
def up_plus_one(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """The (up + 1) of another model's swiglu."""
    return functional.silu(gate) * (up + 1)


@_at("activate")
def gate_plus_a_hundredth(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """0.01 is added to the gate."""
    return functional.silu(gate + 0.01) * up


@_at("activate")
def gate_clamped_at_7(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """The limit of another model's swiglu: the gate is clamped at 7."""
    return functional.silu(gate.clamp(max=7.0)) * up


@_at("activate")
def up_clamped_at_7(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """The limit of another model's swiglu: up is clamped to 7 on both sides."""
    return functional.silu(gate) * up.clamp(-7.0, 7.0)


@_at(
    "activate",
    unseen="with fp8 dispatch no gate of exact inputs is above 64; in bf16 some are, and exact inputs show it",
)
def gate_clamped_at_64(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """The gate is clamped at 64."""
    return functional.silu(gate.clamp(max=64.0)) * up


@_at("activate")
def leaky_silu(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """A negative gate leaks: a hundredth of it comes through."""
    return (functional.silu(gate) + 0.01 * gate.clamp(max=0.0)) * up


@_at("activate")
def softsign_sigmoid(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """A rational approximation of the sigmoid that is off by up to 0.08."""
    return gate * (0.5 + 0.5 * gate / (1 + gate.abs())) * up


@_at("activate", touches="elements")
def identity_in_the_last_column(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """The last intermediate column has no activation."""
    made = site.right(gate, up)
    made[..., -1] = gate[..., -1] * up[..., -1]
    return made


@_at("activate", touches="elements")
def relu_in_column_0(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Intermediate column 0 has relu."""
    made = site.right(gate, up)
    made[..., 0] = gate[..., 0].relu() * up[..., 0]
    return made


@_at("activate", touches="elements")
def sign_lost_in_column_64(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """The first column of a second tile of 64 has silu of the gate's magnitude."""
    made = site.right(gate, up)
    made[..., 64] = functional.silu(gate[..., 64].abs()) * up[..., 64]
    return made


@_at("activate", touches="elements")
def gelu_in_two_columns(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Intermediate columns 30 and 31, the end of a vector, have gelu."""
    made = site.right(gate, up)
    made[..., 30:32] = functional.gelu(gate[..., 30:32]) * up[..., 30:32]
    return made


@_at("first", touches="row")
def gate_of_one_row_halved(site: Site, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """The gate of one row in 64 is halved before silu."""
    made = site.right(rows, w1, group, choice)
    half = made.shape[2] // 2
    made[..., :half] = torch.where(site.rare_in(group), made[..., :half] / 2, made[..., :half])
    return made


@_at("first", touches="row")
def one_row_without_up(site: Site, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
    """Up is 1 in one row in 64."""
    made = site.right(rows, w1, group, choice)
    half = made.shape[2] // 2
    made[..., half:] = torch.where(site.rare_in(group), 1.0, made[..., half:])
    return made


@_at("activate", equivalent="exp2 of x log2(e) is exp of x within 2^-22, an eighth of a thousandth of a bf16 ulp")
def silu_by_exp2(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Silu is computed by exp2, as device kernels do."""
    return gate / (1 + torch.exp2(gate * -math.log2(math.e))) * up


@_at("activate", equivalent="sigmoid(x) is (1 + tanh(x / 2)) / 2, within 2^-22 in float32")
def silu_by_tanh(site: Site, gate: Tensor, up: Tensor) -> Tensor:
    """Silu is computed by tanh."""
    return gate * (0.5 + 0.5 * torch.tanh(gate / 2)) * up
