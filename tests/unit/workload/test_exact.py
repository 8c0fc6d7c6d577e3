"""The exact plan and its tensors: bounds, refusals, and coverage of every column and row."""

from __future__ import annotations

import hashlib

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distbench.case.presets import PRESETS
from distbench.errors import InvalidCase
from distbench.utils.amd_arch import LARGEST_FP8, Fp8Format
from distbench.workload.blind_spots import blind_spots
from distbench.workload.codes import code_columns, code_groups
from distbench.workload.exact import dense_weights, hidden_states, routing_weights, sum_patterns
from distbench.workload.exact_plan import ExactPlan, Intermediate, gate_reads, plan_exact, up_reads
from distbench.workload.places import places_of
from distbench.workload.probe_plan import plan_code
from distbench.workload.quantize import dequantize, fp8_dtype, quantize_fp8_blocks, quantize_weight_blocks
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
    most = plan.topk * plan.down_entries * plan.up_entries * 32 * plan.down_step
    assert most <= plan.max_units * plan.unit
    assert 1 <= plan.up_entries <= 4
    assert 1 <= plan.down_entries <= 8
    assert plan.payload_columns >= plan.up_entries
    assert plan.sum_columns * plan.down_entries >= plan.sum_rows >= plan.down_entries
    if plan.probes is not None:
        assert plan.probes.rows <= plan.probes.columns
        assert plan.probes.rows % plan.probes.live_groups == plan.probes.columns % plan.probes.live_groups == 0
        assert plan.probes.live_groups <= plan.probes.code.groups
        assert min(plan.probes.gate_rows, plan.probes.up_rows, plan.probes.hot_rows) >= 0


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("ep_size", [1, 2, 8])
def test_presets_are_planned_and_fp8_requires_columns_divisible_by_128(name: str, ep_size: int) -> None:
    shape = PRESETS[name]
    sizes = (shape.hidden_size, shape.intermediate_size, shape.topk)
    plan = plan_exact(*sizes, "bf16", shape.experts_for(ep_size))
    check_bounds(plan)
    assert plan.weight_ratio == 2
    assert plan.up_entries == 4
    assert plan.probes is not None
    assert blind_spots(plan) == []
    if name in ("gpt-oss-120b", "tiny-odd"):
        with pytest.raises(InvalidCase, match="blocks of 128 columns"):
            plan_exact(*sizes, "fp8", shape.experts_for(ep_size))
    else:
        check_bounds(plan_exact(*sizes, "fp8", shape.experts_for(ep_size)))


@pytest.mark.parametrize(
    ("topk", "entries"),
    [
        (1, (2, 4, 2)),
        (8, (2, 4, 2)),
        (32, (2, 4, 1)),
        (64, (2, 2, 1)),
        (128, (2, 1, 1)),
        (129, (1, 1, 1)),
        (256, (1, 1, 1)),
    ],
)
def test_larger_topk_reduces_entries_and_finally_the_second_weight(topk: int, entries: tuple[int, int, int]) -> None:
    plan = plan_exact(2048, 768, topk, "bf16", 256)
    assert (plan.weight_ratio, plan.up_entries, plan.down_entries) == entries


@pytest.mark.parametrize("topk", range(1, 9))
def test_quantised_combine_keeps_both_weights_and_probes_up_to_topk_eight(topk: int) -> None:
    for combine in ("fp8_direct_cast", "fp8_blockwise"):
        plan = plan_exact(2048, 768, topk, "bf16", 128, combine)
        assert plan.weight_ratio == 2
        assert plan.probes is not None
        assert bool(plan.probes.hot_rows) == (combine == "fp8_blockwise")
    assert plan_exact(2048, 768, 9, "bf16", 128, "fp8_blockwise").weight_ratio == 1


@pytest.mark.parametrize(
    ("experts", "topk", "codes"),
    [
        (8, 1, 8),
        (8, 2, 12),
        (8, 4, 24),
        (384, 4, 24),
        (64, 6, 36),
        (128, 8, 57),
        (256, 8, 64),
        (384, 8, 67),
        (8, 8, 48),
    ],
)
def test_codes_miss_at_most_one_token_in_ten_thousand(experts: int, topk: int, codes: int) -> None:
    code = plan_code(experts, topk, 2048)
    assert (code.groups, code.columns) == (2 * topk, codes)
    assert code.missing <= 1e-4


@pytest.mark.parametrize(
    ("shape", "said"),
    [
        ((2048, 768, 257, "bf16", 512), ["topk = 257", "256 units", "up to topk = 256"]),
        ((3, 8, 1, "bf16", 4), ["hidden_size = 3", "at least 4 columns"]),
        ((200, 128, 2, "fp8", 4), ["hidden_size = 200", "blocks of 128 columns"]),
        ((64, 1024, 8, "bf16", 8), ["intermediate_size = 1024", "64 w2 rows read 512 intermediate rows of 1024"]),
        ((2048, 16, 1, "bf16", 4), ["intermediate_size = 16", "4 experts read", "hidden columns of 2"]),
    ],
)
def test_refusal_of_a_shape_names_the_bound(shape: tuple[int, int, int, str, int], said: list[str]) -> None:
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
    assert e * max(up_reads(plan), gate_reads(plan)) >= plan.payload_columns


def test_narrow_output_has_more_w2_entries_and_fewer_probes() -> None:
    plan = plan_exact(512, 2048, 8, "bf16", 8)
    assert (plan.up_entries, plan.down_entries) == (2, 8)
    assert plan.probes is not None
    assert plan.probes.rows == plan.probes.columns == 256


def test_every_shape_from_four_columns_and_two_rows_has_probes() -> None:
    for hidden in range(4, 40):
        for inter in range(2, min(4 * hidden, 40)):
            plan = plan_exact(hidden, inter, 2, "bf16", 16)
            assert plan.probes is not None, (hidden, inter)
            check_bounds(plan)


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
@pytest.mark.parametrize("seed", [0, 1, 2**62])
def test_weight_rows_hold_the_entries_of_the_plan(shape: tuple[str, int, int, int, str, int], seed: int) -> None:
    plan = plan_of(shape)
    places, inter = places_of(plan, torch.device("cpu")), plan.intermediate_size
    w1, w2 = dense_weights(plan, seed, torch.arange(shape[5]))
    assert w1.shape == (shape[5], 2 * inter, plan.hidden_size)
    assert w2.shape == (shape[5], plan.hidden_size, inter)
    assert w1.dtype == w2.dtype == torch.bfloat16
    gate, up = w1[:, :inter], w1[:, inter:]
    sums = places.sum_rows
    assert bool((gate[:, sums, 0] == 32).all())
    assert bool((gate[:, sums] != 0).sum(2).eq(1).all())
    assert bool((up[:, sums].abs() == 1).sum(2).eq(plan.up_entries).all())
    assert bool((up[:, sums] != 0).sum(2).eq(plan.up_entries).all())
    reading = w2[:, places.sum_columns][:, :, sums]
    assert bool((reading.abs() == 1).sum(2).eq(plan.down_entries).all())
    assert not bool(w2[:, places.sum_columns][:, :, places.probe_rows].any())
    assert bool((w2[:, places.probe_columns] != 0).sum(2).eq(1).all())
    assert not bool(w2[:, places.probe_columns][:, :, sums].any())
    guards = w2[:, :, places.guards] + w2[:, :, places.twins]
    assert not bool(guards.any())


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_every_weight_column_and_row_is_read_by_some_token(shape: tuple[str, int, int, int, str, int]) -> None:
    plan = plan_of(shape)
    places = places_of(plan, torch.device("cpu"))
    w1, w2 = dense_weights(plan, 5, torch.arange(shape[5]))
    columns = torch.ones(plan.hidden_size, dtype=torch.bool)
    columns[places.wide] = not any("wide columns" in text for text in blind_spots(plan))
    columns[places.zeros] = plan.guard_rows
    read = (w1 != 0).any(1).any(0)
    assert bool(read[columns].all())
    assert bool((w2 != 0).any(1).all())


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_weights_differ_between_experts_and_seeds(shape: tuple[str, int, int, int, str, int]) -> None:
    plan = plan_of(shape)
    for weights in (*dense_weights(plan, 0, torch.arange(shape[5])), *dense_weights(plan, 1, torch.arange(shape[5]))):
        assert torch.unique(weights.flatten(1).float(), dim=0).shape[0] == shape[5]
    first, second = (sum_patterns(plan, seed, torch.arange(shape[5])) for seed in (0, 1))
    assert not any(torch.equal(left, right) for left, right in zip(first, second, strict=True))


def test_weights_of_a_single_expert_equal_those_of_the_whole() -> None:
    for shape in SHAPES:
        plan = plan_of(shape)
        whole = dense_weights(plan, 3, torch.arange(shape[5]))
        picked = dense_weights(plan, 3, torch.tensor([shape[5] - 1, 0]))
        assert all(torch.equal(part, every[[-1, 0]]) for part, every in zip(picked, whole, strict=True))


@pytest.mark.parametrize("shape", SHAPES, ids=SHAPE_IDS)
def test_hidden_states_take_the_values_of_the_plan(shape: tuple[str, int, int, int, str, int]) -> None:
    plan = plan_of(shape)
    places = places_of(plan, torch.device("cpu"))
    hidden = hidden_states(plan, 0, torch.arange(300), drawn(shape[5], plan.topk, 300)).float()
    others = torch.ones(plan.hidden_size, dtype=torch.bool)
    for part in (places.codes, places.wide, places.zeros, torch.tensor([0])):
        others[part] = False
    assert bool((hidden[:, 0] == 1).all())
    assert set(hidden[:, places.codes].sum(1).tolist()) <= {0.0, 1.0}
    assert set(hidden[:, places.codes].unique().tolist()) == {0.0, 1.0}
    assert set(hidden[:, others].unique().tolist()) == {-1.0, 0.0, 1.0}
    assert abs(float(hidden[:, others].abs().mean()) - 2 / 3) < 0.03
    assert not bool(hidden[:, places.zeros].any())
    assert bool(((hidden[:, places.wide] >= 1) & (hidden[:, places.wide] < 32)).all())
    assert torch.unique(hidden, dim=0).shape[0] == 300


def drawn(experts: int, topk: int, tokens: int) -> Tensor:
    keys = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(experts))
    return keys.argsort(1)[:, :topk].int()


@pytest.mark.parametrize(("experts", "topk"), [(8, 4), (16, 8), (128, 8), (256, 8), (64, 32), (20, 16)])
def test_experts_of_a_token_use_different_code_groups(experts: int, topk: int) -> None:
    plan = plan_exact(512, 256, topk, "bf16", experts)
    ids = drawn(experts, topk, 400)
    ids[::7, 0] = -1
    column = code_columns(plan, torch.arange(400), ids)
    groups = code_groups(plan, torch.device("cpu"))
    assert float((column == plan.code_columns).float().mean()) <= 0.02
    for token in (column < plan.code_columns).nonzero().flatten().tolist():
        valid = ids[token][ids[token] >= 0].long()
        assert len(set(groups[valid, column[token]].tolist())) == len(valid)
    twice = ids.clone()
    twice[:, 1] = twice[:, 2]
    assert bool((code_columns(plan, torch.arange(400), twice) == plan.code_columns).all())


def test_routing_weights_are_one_or_half_and_differ_between_slots_and_tokens() -> None:
    plan = plan_exact(256, 128, 4, "bf16", 8)
    weights = routing_weights(plan, 0, torch.arange(500))
    assert weights.dtype == torch.float32
    assert weights.shape == (500, 4)
    assert set(weights.unique().tolist()) == {0.5, 1.0}
    assert abs(float(weights.mean()) - 0.75) < 0.02
    assert bool((weights[:, 0] != weights[:, 1]).all())
    assert bool((weights[1:, 0] != weights[:-1, 0]).all())
    assert bool((weights != weights.roll(1, 1)).any(1).all())
    plain = msgspec.structs.replace(plan, weight_ratio=1)
    assert bool((routing_weights(plain, 0, torch.arange(500)) == 1).all())


@pytest.mark.parametrize("hidden_size", [128, 256, 7168])
@pytest.mark.parametrize("fp8", ["e4m3fn", "e4m3fnuz"])
def test_fp8_quantisation_of_hidden_states_is_exact_and_neighbouring_scales_differ(
    hidden_size: int, fp8: Fp8Format
) -> None:
    plan = plan_exact(hidden_size, hidden_size // 2, 4, "fp8", 8, fp8_format=fp8)
    hidden = hidden_states(plan, 0, torch.arange(64), drawn(8, 4, 64))
    quantized, scales = quantize_fp8_blocks(hidden, fp8_dtype(fp8))
    assert bool((torch.frexp(scales).mantissa == 0.5).all())
    assert bool((scales[1:] != scales[:-1]).all())
    assert bool((scales[:, 1:] != scales[:, :-1]).all())
    restored = dequantize(quantized, scales).bfloat16()
    assert torch.equal(restored.view(torch.int16), hidden.view(torch.int16))


@pytest.mark.parametrize("fp8", ["e4m3fn", "e4m3fnuz"])
@pytest.mark.parametrize("combine", ["none", "fp8_blockwise"])
@pytest.mark.parametrize("intermediate", ["bf16", "e4m3"])
def test_fp8_quantisation_of_weights_is_exact_and_neighbouring_block_scales_differ(
    fp8: Fp8Format, combine: str, intermediate: Intermediate
) -> None:
    """Scales follow the rule of the Triton kernels and of the aiter adapter: the least sufficient power of two."""
    plan = plan_exact(512, 256, 4, "fp8", 8, combine, fp8, intermediate)
    w1, w2 = dense_weights(plan, 4, torch.arange(8))
    for weights in (w1[:, :256], w1[:, 256:], w2):
        narrow, scales = quantize_weight_blocks(weights, fp8_dtype(fp8))
        blocks = narrow.float().view(8, scales.shape[1], 128, scales.shape[2], 128)
        restored = (blocks * scales.view(8, scales.shape[1], 1, scales.shape[2], 1)).view(weights.shape)
        assert torch.equal(restored, weights.float())
        assert bool((scales[:, 1:] != scales[:, :-1]).all())
        assert bool((scales[:, :, 1:] != scales[:, :, :-1]).all())
        assert bool((scales[1:] != scales[:-1]).any((1, 2)).all())


@pytest.mark.parametrize("fp8", ["e4m3fn", "e4m3fnuz"])
@pytest.mark.parametrize("topk", [1, 2, 4])
def test_sums_of_an_fp8_combine_are_representable_in_each_format(fp8: Fp8Format, topk: int) -> None:
    plan = plan_exact(256, 128, topk, "bf16", 8, "fp8_blockwise", fp8)
    sums = torch.arange(-plan.max_units, plan.max_units + 1) * plan.unit
    assert float(sums.max()) <= LARGEST_FP8[fp8] == torch.finfo(fp8_dtype(fp8)).max
    assert torch.equal(sums.to(fp8_dtype(fp8)).float(), sums)


@pytest.mark.parametrize("device", DEVICES)
def test_exact_tensors_equal_their_golden_digests(device: str) -> None:
    keys = token_keys(torch.tensor([0, 3], device=device), torch.tensor([5, 1], device=device))
    experts = torch.tensor([2, 7], device=device)
    found = []
    for shape in SHAPES:
        plan = plan_of((*shape[:5], 8))
        ids = drawn(8, plan.topk, 2).to(device)
        inputs = hidden_states(plan, 1, keys, ids), routing_weights(plan, 1, keys)
        found.append(digest(*inputs, *dense_weights(plan, 1, experts)))
    assert found == [
        "f4f03ff60c5feea2",
        "b0c4e093f7615a28",
        "e73698194d5ab6d0",
        "4b980dfea10faed1",
        "074376c019369773",
        "174d7daa178b151e",
        "73bcf02a799c286e",
        "440ae2c6b0ccae74",
    ]
