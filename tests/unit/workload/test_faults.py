"""Faults that sums alone do not reveal and exact inputs do; bf16 and fp8, plain and quantised.

A fault is detected if any expert row differs, or, for combine, any token.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload
from distbench.workload.quantize import fp8_dtype, quantize_weight_blocks, saturated
from tests.unit.workload.kernels import Fault, Kernel, Layer, layer_of, run
from tests.unit.workload.shapes import changed_rows, plan_of_workload, workload_of

LAYERS: dict[str, Callable[[], Workload]] = {
    "bf16": lambda: workload_of("tiny", 3, tokens=24),
    "bf16, eight experts, fp8 combine": lambda: workload_of(
        "qwen3-30b-a3b/8", 3, tokens=96, combine_quant="fp8_blockwise"
    ),
    "fp8": lambda: workload_of("tiny fp8", 3, tokens=24, intermediate="e4m3"),
    "fp8, wide": lambda: workload_of(
        "tiny fp8", 4, tokens=24, intermediate="e4m3", hidden_size=512, intermediate_size=256
    ),
    "fp8, bf16 intermediate": lambda: workload_of("tiny fp8", 5, tokens=24),
    "fnuz, fp8 combine": lambda: workload_of(
        "tiny fnuz", 3, tokens=24, intermediate="e4m3", combine_quant="fp8_direct_cast"
    ),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": lambda gate: gate,
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu by tanh": lambda gate: functional.gelu(gate, approximate="tanh"),
    "hardswish": functional.hardswish,
    "mish": functional.mish,
    "quick gelu": lambda gate: gate * torch.sigmoid(1.702 * gate),
    "silu of the magnitude": lambda gate: functional.silu(gate.abs()),
    "gate + 0.01": lambda gate: functional.silu(gate + 0.01),
    "clamp at 7": lambda gate: functional.silu(gate.clamp(max=7)),
}


def first_columns(weights: Tensor) -> Tensor:
    """Gates that read their first 65 columns only."""
    kept = weights.clone()
    kept[: weights.shape[0] // 2, 65:] = 0
    return kept


def last_block_twice(weights: Tensor) -> Tensor:
    doubled = weights.clone()
    doubled[: weights.shape[0] // 2, -64:] *= 2
    return doubled


def one_element(weights: Tensor) -> Tensor:
    """The gates' product without its fifth column, one element of K."""
    lost = weights.clone()
    lost[: weights.shape[0] // 2, 5] = 0
    return lost


COLUMNS = {"first 65 columns": first_columns, "last block twice": last_block_twice, "one column": one_element}
SCALES: dict[str, Callable[[Tensor], Tensor]] = {
    "a neighbouring row's": lambda scales: scales.roll(1, 0),
    "a neighbouring block's": lambda scales: scales.roll(1, 1),
    "reversed": lambda scales: scales.flip(1),
    "transposed": lambda scales: scales.t().reshape(scales.shape),
    "constant": lambda scales: torch.full_like(scales, float(scales[0, 0])),
    "one row for all": lambda scales: scales[:1].expand_as(scales),
}
WEIGHTS: dict[str, Callable[[Tensor], Tensor]] = {
    "ignored": torch.ones_like,
    "squared": torch.square,
    "rotated": lambda weights: weights.roll(1, 1),
    "a neighbour's": lambda weights: weights.roll(1, 0),
    "reversed": lambda weights: weights.flip(1),
}


def share_of(layer: str) -> tuple[Workload, Layer, TokenBatch, Tensor]:
    """Experts of a rank, a batch that it may receive, and the expected rows."""
    workload = LAYERS[layer]()
    batch = workload.tokens(1)
    expected = workload.expected_rows(1, batch)
    assert expected is not None
    local = layer_of(workload, range(1, 2))
    assert changed_rows(expected, run(Kernel(), local, batch)) == []
    return workload, local, batch, expected


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_another_activation_changes_expert_rows(layer: str, name: str) -> None:
    _, local, batch, expected = share_of(layer)
    assert changed_rows(expected, run(Kernel(), local, batch, Fault(activation=ACTIVATIONS[name])))


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("name", COLUMNS)
def test_misread_gate_columns_change_expert_rows(layer: str, name: str) -> None:
    _, local, batch, expected = share_of(layer)
    assert changed_rows(expected, run(Kernel(), local, batch, Fault(columns=COLUMNS[name])))


@pytest.mark.parametrize("layer", LAYERS)
def test_routing_weight_applied_to_the_gate_changes_expert_rows(layer: str) -> None:
    _, local, batch, expected = share_of(layer)
    assert changed_rows(expected, run(Kernel(), local, batch, Fault(weigh_gate=True)))


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.startswith("f")])
@pytest.mark.parametrize("name", SCALES)
def test_wrong_scales_of_received_rows_change_nearly_all_expert_rows(layer: str, name: str) -> None:
    """The scales are wrong in the kernel, or as delivered by the transport."""
    _, local, batch, expected = share_of(layer)
    assert batch.scales is not None
    moved = batch._replace(scales=SCALES[name](batch.scales))
    touched = (SCALES[name](batch.scales) != batch.scales).any(1) & expected.any(1)
    assert len(changed_rows(expected, run(Kernel(), local, moved))) >= 0.9 * int(touched.sum())
    assert int(touched.sum()) >= 6


@pytest.mark.parametrize("layer", ["fp8", "fp8, wide", "fnuz, fp8 combine"])
@pytest.mark.parametrize("name", ["a neighbouring row's", "constant", "one row for all"])
def test_wrong_scales_of_the_intermediate_change_expert_rows(layer: str, name: str) -> None:
    _, local, batch, expected = share_of(layer)
    assert changed_rows(expected, run(Kernel(), local, batch, Fault(scales=SCALES[name])))


@pytest.mark.parametrize("name", ["a neighbouring block's", "reversed", "constant"])
def test_wrong_block_scales_of_the_intermediate_change_expert_rows(name: str) -> None:
    _, local, batch, expected = share_of("fp8, wide")
    assert changed_rows(expected, run(Kernel(), local, batch, Fault(scales=SCALES[name])))


@pytest.mark.parametrize("stage", ["gate", "up", "down"])
@pytest.mark.parametrize("name", ["constant", "next row of blocks", "next column of blocks", "another expert's"])
def test_wrong_weight_scales_change_expert_rows(stage: str, name: str) -> None:
    _, local, batch, expected = share_of("fp8, wide")
    half = local.w1.shape[1] // 2
    part = {"gate": local.w1[:, :half], "up": local.w1[:, half:], "down": local.w2}[stage]
    narrow, scales = quantize_weight_blocks(part.bfloat16(), torch.float8_e4m3fn)
    other = {
        "constant": torch.full_like(scales, float(scales[0, 0, 0])),
        "next row of blocks": scales.roll(1, 1),
        "next column of blocks": scales.roll(1, 2),
        "another expert's": scales.roll(1, 0),
    }[name]
    part.copy_(narrow.float() * other.repeat_interleave(128, 1).repeat_interleave(128, 2))
    assert changed_rows(expected, run(Kernel(), local, batch))


@pytest.mark.parametrize("combine", ["none", "fp8_direct_cast", "fp8_blockwise"])
@pytest.mark.parametrize("topk", range(2, 9))
@pytest.mark.parametrize("name", WEIGHTS)
def test_wrong_routing_weights_change_every_token(name: str, topk: int, combine: str) -> None:
    workload = workload_of("qwen3-30b-a3b/8", 7, tokens=24, topk=topk, combine_quant=combine)
    batch = workload.tokens(0)
    expected = workload.expected(batch)
    assert expected is not None
    weights = WEIGHTS[name](batch.weights)
    wrong = workload.expected(batch._replace(weights=weights))
    assert len(changed_rows(expected, wrong)) == int((weights != batch.weights).any(1).sum()) > 0


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("row", [63, 127, 126, 0])
def test_lost_intermediate_row_of_a_block_changes_expert_rows(layer: str, row: int) -> None:
    """The rows include guard rows if the plan has any."""
    workload, local, batch, expected = share_of(layer)
    inter = plan_of_workload(workload).intermediate_size

    def without(values: Tensor) -> Tensor:
        lost = values.clone()
        lost[:, min(row, inter - 1)] = 0
        return lost

    assert changed_rows(expected, run(Kernel(), local, batch, Fault(intermediate=without)))


@pytest.mark.parametrize("layer", ["bf16", "fp8, bf16 intermediate", "fnuz, fp8 combine"])
def test_truncation_instead_of_rounding_changes_expert_rows(layer: str) -> None:
    """An intermediate of three bits leaves nothing to round, so the rows do not change there."""
    _, local, batch, expected = share_of(layer)

    def cut(values: Tensor) -> Tensor:
        return (values.view(torch.int32) & -0x10000).view(torch.float32)

    seen = bool(changed_rows(expected, run(Kernel(), local, batch, Fault(output=cut))))
    assert seen == (local.fp8 is None)


@pytest.mark.parametrize("bits", [8, 4])
def test_hidden_states_of_lower_precision_change_expert_rows(bits: int) -> None:
    _, local, batch, expected = share_of("bf16")
    hidden = batch.hidden.float()
    scale = hidden.abs().amax(1, keepdim=True) / (127 if bits == 8 else 448)
    narrow = (hidden / scale).round() if bits == 8 else saturated(hidden / scale, torch.float8_e4m3fn).float()
    assert changed_rows(expected, run(Kernel(), local, batch._replace(hidden=narrow * scale)))


def test_wrong_block_scales_of_a_combine_change_tokens() -> None:
    """In each block one output of some rows is so large that the block is scaled."""
    workload = workload_of("tiny", 3, tokens=64, combine_quant="fp8_blockwise")
    batch = workload.tokens(0)
    plan = plan_of_workload(workload)
    rows = workload.expected_rows(0, batch)
    assert rows is not None
    blocks = functional.pad(rows.float().abs(), (0, -plan.hidden_size % 5)).view(64, -1, 5).amax(2)
    assert bool((blocks > 448).any(0).float().mean() > 0.8)
    assert {448.0, 896.0, 1792.0} >= set(blocks[blocks >= 448].tolist())
    unscaled = saturated(rows.float(), fp8_dtype(plan.fp8_format)).bfloat16()
    assert changed_rows(workload.returned_rows(rows), unscaled)
