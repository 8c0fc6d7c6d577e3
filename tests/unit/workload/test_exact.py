"""The exact plan and its tensors: bounds, refusals, and that everything readable is read."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distbench.architectures import LARGEST_FP8, Fp8Format
from distbench.errors import InvalidCase
from distbench.models import PRESETS
from distbench.workload.exact import dense_weights, expert_patterns, hidden_states, routing_weights
from distbench.workload.plan import ExactPlan, plan_exact
from distbench.workload.quantize import dequantize, fp8_dtype, quantize_fp8_blocks
from distbench.workload.routing import token_keys

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
SHAPES = [
    ("tiny", 256, 128, 4, "bf16", 8),
    ("tiny", 256, 128, 4, "fp8", 8),
    ("tiny-odd", 192, 96, 3, "bf16", 10),
    ("narrow experts", 512, 24, 2, "bf16", 24),
    ("odd fp8", 384, 96, 6, "fp8", 12),
    ("wide experts", 128, 448, 2, "bf16", 4),
    ("prime", 131, 53, 5, "bf16", 6),
    ("just enough rows", 103, 21, 4, "bf16", 2),
]
SHAPE_IDS = [f"{shape[0]} {shape[4]}" for shape in SHAPES]


def plan_of(shape: tuple[str, int, int, int, str, int]) -> ExactPlan:
    _, hidden, inter, topk, dtype, experts = shape
    return plan_exact(hidden, inter, topk, "fp8" if dtype == "fp8" else "bf16", experts)


def digest(*tensors: Tensor) -> str:
    content = b"".join(bytes(part.cpu().contiguous().view(torch.uint8).flatten().tolist()) for part in tensors)
    return hashlib.sha256(content).hexdigest()[:16]


def check_bounds(plan: ExactPlan) -> None:
    most = plan.topk * plan.down_entries * plan.up_entries * 64
    assert most <= 256 * plan.unit
    assert 1 <= plan.up_entries <= 4
    assert 1 <= plan.down_entries <= 8
    assert plan.up_columns >= plan.up_entries
    assert plan.hidden_size * plan.down_entries >= plan.live_rows >= plan.down_entries


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("ep_size", [1, 2, 8])
def test_presets_are_accepted_and_fp8_where_128_divides_the_columns(name: str, ep_size: int) -> None:
    shape = PRESETS[name]
    sizes = (shape.hidden_size, shape.intermediate_size, shape.topk)
    plan = plan_exact(*sizes, "bf16", shape.experts_for(ep_size))
    check_bounds(plan)
    assert plan.weight_ratio == 2
    assert plan.up_entries == 4
    if name in ("gpt-oss-120b", "tiny-odd"):
        with pytest.raises(InvalidCase, match="blocks of 128 columns"):
            plan_exact(*sizes, "fp8", shape.experts_for(ep_size))
    else:
        check_bounds(plan_exact(*sizes, "fp8", shape.experts_for(ep_size)))


@pytest.mark.parametrize(
    ("topk", "entries"),
    [
        (1, (2, 4, 8)),
        (2, (2, 4, 8)),
        (4, (2, 4, 4)),
        (8, (2, 4, 2)),
        (10, (2, 4, 1)),
        (16, (2, 4, 1)),
        (32, (2, 2, 1)),
        (64, (2, 1, 1)),
        (65, (1, 1, 1)),
        (128, (1, 1, 1)),
    ],
)
def test_larger_topk_costs_entries_and_last_the_second_weight(topk: int, entries: tuple[int, int, int]) -> None:
    plan = plan_exact(2048, 768, topk, "bf16", 128)
    assert (plan.weight_ratio, plan.up_entries, plan.down_entries) == entries


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((2048, 768, 129, "bf16", 256), ["topk = 129", "256 units", "up to topk = 128"]),
        ((7, 8, 1, "bf16", 4), ["hidden_size = 7", "at least 8 columns"]),
        ((200, 128, 2, "fp8", 4), ["hidden_size = 200", "blocks of 128 columns"]),
        ((64, 1024, 8, "bf16", 8), ["intermediate_size = 1024", "64 w2 rows read 512 intermediate rows of 1024"]),
        ((2048, 16, 8, "bf16", 8), ["intermediate_size = 16", "8 experts read 512 hidden columns of 2031"]),
    ],
)
def test_refusals_name_the_bound(shape: tuple[int, int, int, str, int], said: list[str]) -> None:
    with pytest.raises(InvalidCase) as caught:
        plan_of(("", *shape))
    assert all(part in str(caught.value) for part in [*said, "use numerics = gaussian"])


@given(
    st.integers(1, 600), st.integers(1, 600), st.integers(1, 140), st.sampled_from(["bf16", "fp8"]), st.integers(1, 64)
)
def test_any_shape_is_planned_within_bounds_or_refused(hidden: int, inter: int, topk: int, dtype: str, e: int) -> None:
    try:
        plan = plan_of(("", hidden, inter, topk, dtype, e))
    except InvalidCase:
        return
    check_bounds(plan)
    assert e * plan.live_rows * plan.up_entries >= plan.up_columns


def test_a_narrow_output_gets_more_w2_entries() -> None:
    assert plan_exact(512, 2048, 8, "bf16", 8).down_entries == 4
    assert plan_exact(512, 2048, 8, "bf16", 8).up_entries == 2


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_rows_hold_what_the_plan_says(shape: tuple[str, int, int, int, str, int], seed: int) -> None:
    plan = plan_of(shape)
    inter = plan.intermediate_size
    w1, w2 = dense_weights(plan, seed, torch.arange(shape[5]))
    assert w1.shape == (shape[5], 2 * inter, plan.hidden_size)
    assert w2.shape == (shape[5], plan.hidden_size, inter)
    assert w1.dtype == w2.dtype == torch.bfloat16
    guards = torch.zeros(inter, dtype=torch.bool)
    guards[127::128] = plan.guard_rows
    gate, up = w1[:, :inter][:, ~guards], w1[:, inter:][:, ~guards]
    assert bool((gate[:, :, 0] == 32).all())
    assert bool((gate[:, :, 1 : 1 + plan.gate_columns] == 32).sum(2).eq(1).all())
    assert bool((gate != 0).sum(2).eq(2).all())
    assert bool((up.abs() == 1).sum(2).eq(plan.up_entries).all())
    assert bool((up != 0).sum(2).eq(plan.up_entries).all())
    assert bool((w2.abs() == 1).sum(2).eq(plan.down_entries).all())
    assert bool((w2 != 0).sum(2).eq(plan.down_entries).all())
    assert not bool(w2[:, :, guards].any())
    assert bool((w1[:, :inter][:, guards].float().sum(2) == 64).all())
    assert bool((w1[:, inter:][:, guards].float().sum(2) == 7).all())


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_every_column_and_row_is_read(shape: tuple[str, int, int, int, str, int]) -> None:
    plan = plan_of(shape)
    w1, w2 = dense_weights(plan, 5, torch.arange(shape[5]))
    columns = torch.ones(plan.hidden_size, dtype=torch.bool)
    columns[127::128] = not plan.guard_columns
    rows = torch.ones(plan.intermediate_size, dtype=torch.bool)
    rows[127::128] = not plan.guard_rows
    assert torch.equal((w1 != 0).any(1).any(0), columns)
    assert torch.equal((w2 != 0).any(1), rows.expand(shape[5], -1))
    if plan.live_rows * plan.up_entries >= plan.up_columns:
        assert torch.equal((w1 != 0).any(1), columns.expand(shape[5], -1))


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_experts_and_seeds_differ(shape: tuple[str, int, int, int, str, int]) -> None:
    plan = plan_of(shape)
    for weights in (*dense_weights(plan, 0, torch.arange(shape[5])), *dense_weights(plan, 1, torch.arange(shape[5]))):
        assert torch.unique(weights.flatten(1).float(), dim=0).shape[0] == shape[5]
    first, second = (expert_patterns(plan, seed, torch.arange(shape[5])) for seed in (0, 1))
    assert not any(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_any_expert_alone_is_the_same() -> None:
    for shape in SHAPES:
        plan = plan_of(shape)
        whole = dense_weights(plan, 3, torch.arange(shape[5]))
        picked = dense_weights(plan, 3, torch.tensor([shape[5] - 1, 0]))
        assert all(torch.equal(part, every[[-1, 0]]) for part, every in zip(picked, whole, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_hidden_values(shape: tuple[str, int, int, int, str, int]) -> None:
    plan = plan_of(shape)
    hidden = hidden_states(plan, 0, torch.arange(300)).float()
    gates = 1 + plan.gate_columns
    others = torch.ones(plan.hidden_size, dtype=torch.bool)
    others[:gates] = False
    others[127::128] = not plan.guard_columns
    assert bool((hidden[:, 0] == 1).all())
    assert set(hidden[:, 1:gates].unique().tolist()) == {0.0, 1.0}
    assert set(hidden[:, others].unique().tolist()) == {-1.0, 0.0, 1.0}
    assert abs(float(hidden[:, 1:gates].mean()) - 0.5) < 0.03
    assert abs(float(hidden[:, others].abs().mean()) - 2 / 3) < 0.03
    if plan.guard_columns:
        assert bool((hidden[:, 127::128] == 1.75).all())
    assert torch.unique(hidden, dim=0).shape[0] == 300


def test_weights_are_one_or_half() -> None:
    plan = plan_exact(256, 128, 4, "bf16", 8)
    weights = routing_weights(plan, 0, torch.arange(500))
    assert weights.dtype == torch.float32
    assert weights.shape == (500, 4)
    assert set(weights.unique().tolist()) == {0.5, 1.0}
    assert abs(float(weights.mean()) - 0.75) < 0.02
    plain = msgspec.structs.replace(plan, weight_ratio=1)
    assert bool((routing_weights(plain, 0, torch.arange(500)) == 1).all())


@pytest.mark.parametrize("hidden_size", [128, 256, 7168])
@pytest.mark.parametrize(("fp8", "scale"), [("e4m3fn", 2.0**-8), ("e4m3fnuz", 2.0**-7)])
def test_fp8_quantising_loses_nothing(hidden_size: int, fp8: Fp8Format, scale: float) -> None:
    plan = plan_exact(hidden_size, hidden_size // 2, 4, "fp8", 8, fp8_format=fp8)
    hidden = hidden_states(plan, 0, torch.arange(64))
    quantized, scales = quantize_fp8_blocks(hidden, fp8_dtype(fp8))
    assert bool((scales == scale).all())
    restored = dequantize(quantized, scales).bfloat16()
    assert torch.equal(restored.view(torch.int16), hidden.view(torch.int16))


@pytest.mark.parametrize("fp8", ["e4m3fn", "e4m3fnuz"])
@pytest.mark.parametrize("topk", [1, 2, 4])
def test_what_an_fp8_combine_may_return_is_in_each_format(fp8: Fp8Format, topk: int) -> None:
    plan = plan_exact(256, 128, topk, "bf16", 8, "fp8_blockwise", fp8)
    sums = torch.arange(-plan.max_units, plan.max_units + 1) * plan.unit
    assert float(sums.max()) <= LARGEST_FP8[fp8] == torch.finfo(fp8_dtype(fp8)).max
    assert torch.equal(sums.to(fp8_dtype(fp8)).float(), sums)


@pytest.mark.parametrize("device", DEVICES)
def test_values_never_change(device: str) -> None:
    keys = token_keys(torch.tensor([0, 3], device=device), torch.tensor([5, 1], device=device))
    experts = torch.tensor([2, 7], device=device)
    found = []
    for shape in SHAPES:
        plan = msgspec.structs.replace(plan_of(shape), num_experts=8)
        inputs = hidden_states(plan, 1, keys), routing_weights(plan, 1, keys)
        found.append(digest(*inputs, *dense_weights(plan, 1, experts)))
    assert found == [
        "b68166d07f1079db",
        "862ff79d9be1260e",
        "d7e559783334160b",
        "aa4e9d165333a4ad",
        "570c381d0de43780",
        "4cc73758dda6d694",
        "b714bd2680e51fa8",
        "4410844f57a2edbc",
    ]
