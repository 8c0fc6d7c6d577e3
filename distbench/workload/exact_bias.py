"""Biases of an exact layer: multiples of its units, of gates and up values in rows, and of outputs in sum columns.

A sum row's gate is split between its weight and its bias, and its up bias is one more entry of -1, 0 or 1. A probe
row's bias is added to its payload, in steps of the points; a switch has none, so that off stays 0. Where the activation
adds 1 to up, biases take it off again. A sum column's bias is one more entry of -1, 0 or 1; others have none.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.workload.bits import byte_columns
from distbench.workload.exact_plan import ExactPlan
from distbench.workload.places import places_of
from distbench.workload.points import GATE_BIAS


def gate_biases(plan: ExactPlan, seed: int, experts: Tensor) -> Tensor:
    """Return the gate biases of sum rows, float32 [e, S]: a quarter to three quarters of the gate."""
    return (1 + _thirds(seed, "bias/gate", experts, plan.sum_rows).float()) * (plan.gate_step / 4)


def sum_biases(plan: ExactPlan, seed: int, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Numbers that are added to up values of sum rows, int8 [e, S], and to sum columns in units of down_step gates."""
    ups = _thirds(seed, "bias/up", experts, plan.sum_rows) - 1
    outputs = _thirds(seed, "bias/down", experts, plan.sum_columns) - 1
    return ups.to(torch.int8), outputs.to(torch.int8)


def probe_biases(plan: ExactPlan, seed: int, experts: Tensor) -> Tensor:
    """Return the biases of probe rows' payloads in steps, int32 [e, R]: of gates -2 to 2, of up values -1 or 1."""
    probes = plan.probes
    assert probes is not None  # noqa: S101 - called only for plans that have probes
    bits = byte_columns(seed, "bias/probe", experts, probes.rows, experts.device).to(torch.int32)
    steps = torch.zeros_like(bits)
    steps[:, : probes.gate_rows] = ((bits * (2 * GATE_BIAS + 1)) >> 8)[:, : probes.gate_rows] - GATE_BIAS
    ups = slice(probes.first_up_row, probes.first_up_row + probes.up_rows)
    steps[:, ups] = 1 - 2 * (bits[:, ups] & 1)
    return steps


def biases(plan: ExactPlan, seed: int, experts: Tensor) -> tuple[Tensor, Tensor]:
    """Return bias1 [e, 2I], gate before up, and bias2 [e, H] of `experts` int64 [e], float32."""
    places, inter, device = places_of(plan, experts.device), plan.intermediate_size, experts.device
    first = torch.zeros(experts.numel(), 2 * inter, device=device)
    second = torch.zeros(experts.numel(), plan.hidden_size, device=device)
    ups, outputs = sum_biases(plan, seed, experts)
    first[:, places.sum_rows] = gate_biases(plan, seed, experts)
    first[:, places.sum_rows + inter] = ups.float() - plan.formula.up_shift
    second[:, places.sum_columns] = outputs.float() * (plan.gate_step * plan.down_step)
    if plan.probes is not None:
        steps, gates = probe_biases(plan, seed, experts).float(), plan.probes.first_up_row
        first[:, places.probe_rows[:gates]] = steps[:, :gates] * plan.points.step
        first[:, places.probe_rows[:gates] + inter] = -float(plan.formula.up_shift)
        first[:, places.probe_rows[gates:] + inter] = steps[:, gates:]
    return first, second


def _thirds(seed: int, stream: str, experts: Tensor, count: int) -> Tensor:
    """Return random numbers 0, 1 and 2, int32 [e, count]."""
    return (byte_columns(seed, stream, experts, count, experts.device).to(torch.int32) * 3) >> 8
