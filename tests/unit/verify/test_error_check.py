"""Errors relative to ideal roundings: kernels that keep to their format are within bounds, others are not."""

from __future__ import annotations

import math
import os
import random
from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.experts.blocked_matmul import Weights
from distbench.experts.reference import ReferenceExperts
from distbench.experts.roundings import Roundings, roundings_of
from distbench.experts.selection.choice import KernelChoice, KernelSelector
from distbench.experts.selection.heuristics import LayerKey
from distbench.experts.steps import Group, Steps
from distbench.verify.error_bounds import Figures, Yardstick, sure
from distbench.verify.ideal import Ideal, ideal_rows, summed
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload, make_workload
from distbench.workload.quantize import quantize_fp8_blocks
from tests.cases import tiny_case

SURE = sure(1000)
ROWS = 64
HIDDEN, INTER = 1024, 384


class Layer:
    """One rank's experts of a gaussian layer, with 64 received rows."""

    def __init__(self, dtype: Literal["bf16", "fp8"], seed: int = 0, hidden: int = HIDDEN, inter: int = INTER) -> None:
        self.workload: Workload = make_workload(
            numerics="gaussian",
            hidden_size=hidden,
            intermediate_size=inter,
            num_experts=4,
            topk=3,
            ep_size=1,
            seed=seed,
            routing="uniform",
            tokens_per_rank=(ROWS,),
            dispatch_dtype=dtype,
            device="cpu",
        )
        self.batch: TokenBatch = self.workload.tokens(0)
        mask = torch.ones(4, dtype=torch.int32)
        self.weights = ExpertWeights(*self.workload.local_weights(0), mask)
        self.dtype = dtype

        self._yardsticks: dict[Roundings, Yardstick] = {}

    def yardstick(self, family: Roundings) -> Yardstick:
        if family not in self._yardsticks:
            exact, (ideal,) = ideal_rows(self.batch, self.weights, [family])
            self._yardsticks[family] = Yardstick(exact, ideal, SURE)
        return self._yardsticks[family]

    def run(self, choice: dict[str, Any], steps: Steps | None = None, batch: TokenBatch | None = None) -> Tensor:
        key = LayerKey(
            num_local_experts=4,
            topk=3,
            model_dim=self.weights.w2.shape[1],
            inter_dim=self.weights.w2.shape[2],
            quant=self.dtype,
            cu_count=80,
        )
        experts = ReferenceExperts(KernelSelector(layer=key), 0)
        experts._choices[ROWS] = chosen(**choice)  # noqa: SLF001 - any kernel, whatever the rules choose
        if steps is not None:
            experts.steps = steps
        given = ExpertInput(*(batch or self.batch), torch.tensor([ROWS], dtype=torch.int32))
        return experts(given, self.weights).clone()


@cache
def layer_of(dtype: Literal["bf16", "fp8"]) -> Layer:
    return Layer(dtype)


def chosen(**values: Any) -> KernelChoice:
    return KernelChoice(
        **{
            "rows": ROWS,
            "bucket": ROWS,
            "source": "heuristic",
            "block_m": 32,
            "ksplit": 0,
            "run_1stage": False,
            "stage1": "",
            "stage2": "",
            "stage2_mode": "reduce",
            "tile_k1": 64,
            "tile_k2": 64,
            **values,
        }
    )


KERNELS: dict[str, dict[str, Any]] = {
    "reduce": {},
    "long blocks": {"tile_k1": 256, "tile_k2": 128},
    "split-k": {"ksplit": 4},
    "atomic": {"stage2_mode": "atomic"},
    "one stage": {"run_1stage": True, "stage2_mode": "atomic"},
}


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("kernel", KERNELS)
def test_error_of_a_correct_kernel_is_within_the_bounds_of_its_format(
    kernel: str, dtype: Literal["bf16", "fp8"]
) -> None:
    layer = layer_of(dtype)
    family = roundings_of(tiny_case(2, dispatch_dtype=dtype), chosen(**KERNELS[kernel]))
    found = layer.yardstick(family).measure(layer.run(KERNELS[kernel]))
    assert found.within, found
    assert found.ratio is not None
    assert 0.98 <= found.ratio <= 1.02
    assert found.rows == ROWS


def bf16_sums(rows: Tensor, weights: Weights, group: Group, tile_k: int) -> Tensor:
    """Products whose sum over blocks of K is kept in bf16."""
    total: Tensor | None = None
    blocks = weights.blocks(group.experts, tile_k)
    for left, right in zip(rows.double().split(tile_k, dim=2), blocks, strict=True):
        part = torch.bmm(left, right).float()
        total = part.bfloat16().float() if total is None else (total + part).bfloat16().float()
    assert total is not None
    return total


class Bf16First(Steps):
    def first(self, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
        return bf16_sums(rows, w1, group, choice.tile_k1)


class Bf16Second(Steps):
    def second(self, rows: Tensor, w2: Weights, group: Group, choice: KernelChoice) -> Tensor:
        return bf16_sums(rows, w2, group, choice.tile_k2)


class Fp16First(Steps):
    def first(self, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:  # noqa: ARG002
        total: Tensor | None = None
        blocks = w1.blocks(group.experts, 16)
        for left, right in zip(rows.double().split(16, dim=2), blocks, strict=True):
            part = torch.bmm(left, right)
            total = part.half() if total is None else (total.double() + part).half()
        assert total is not None
        return total.float()


def truncate(values: Tensor) -> Tensor:
    return (values.view(torch.int32) & ~0xFFFF).view(torch.float32)


class TruncatedIntermediate(Steps):
    def store(self, intermediate: Tensor) -> Tensor:
        return truncate(intermediate)


class TruncatedOutput(Steps):
    def round(self, routes: Tensor) -> Tensor:
        return truncate(routes).bfloat16()


class Bf16GateAndUp(Steps):
    def first(self, rows: Tensor, w1: Weights, group: Group, choice: KernelChoice) -> Tensor:
        return super().first(rows, w1, group, choice).bfloat16().float()


class Int8Hidden(Steps):
    def widen(self, hidden: Tensor, scales: Tensor | None) -> Tensor:
        wide = super().widen(hidden, scales)
        scale = wide.abs().amax(1, keepdim=True) / 127
        return (wide / scale).round() * scale


class Bf16Sigmoid(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return gate * torch.sigmoid(gate).bfloat16().float() * up


class GateOff(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.silu(gate + 0.01) * up


class OutputOff(Steps):
    def round(self, routes: Tensor) -> Tensor:
        return (routes * (1 + 2.0**-7)).bfloat16()


class Gelu(Steps):
    def activate(self, gate: Tensor, up: Tensor) -> Tensor:
        return functional.gelu(gate) * up


# Least ratio of errors, and bias if it is significant, if kernels deviate as docs/gaussian.md measures.
DEVIATING: dict[str, tuple[Callable[[], Steps], float, float]] = {
    "bf16 accumulation, stage 1": (Bf16First, 2.4, 0),
    "bf16 accumulation, stage 2": (Bf16Second, 1.35, 0),
    "fp16 accumulation": (Fp16First, 1.1, 0),
    "truncated intermediate": (TruncatedIntermediate, 1.35, -100),
    "truncated output": (TruncatedOutput, 1.3, -100),
    "gate and up rounded to bf16": (Bf16GateAndUp, 1.25, 0),
    "hidden in int8": (Int8Hidden, 3.0, 0),
    "sigmoid in bf16": (Bf16Sigmoid, 1.08, 0),
    "gate + 0.01": (GateOff, 3.0, 100),
    "output * (1 + 2**-7)": (OutputOff, 2.0, 100),
    "gelu for silu": (Gelu, 50.0, 0),
}


@pytest.mark.parametrize("kernel", DEVIATING)
def test_error_of_a_deviating_kernel_is_outside_its_bounds(kernel: str) -> None:
    steps, ratio, bias = DEVIATING[kernel]
    layer = layer_of("bf16")
    found = layer.yardstick(Roundings()).measure(layer.run({}, steps()))
    assert not found.within, found
    assert found.ratio is not None
    assert found.bias is not None
    assert found.ratio > ratio
    assert found.bias < bias if bias < 0 else found.bias >= bias or bias == 0


@pytest.mark.parametrize("family", [Roundings(sums="bf16"), Roundings(bf16_intermediate=False)])
def test_error_within_its_own_rounding_family_is_outside_another_family(family: Roundings) -> None:
    layer = layer_of("bf16")
    assert layer.yardstick(Roundings()).measure(layer.run({})).within
    assert not layer.yardstick(family).measure(layer.run({})).within


def damaged(layer: Layer, damage: Callable[[Tensor], object]) -> Figures:
    rows = layer.run({})
    damage(rows)
    return layer.yardstick(Roundings()).measure(rows)


def test_one_wrong_element_in_one_row_is_found() -> None:
    layer = layer_of("bf16")

    def element(rows: Tensor) -> None:
        rows[17, 5] += 0.05 * rows[17].abs().amax()

    found = damaged(layer, element)
    assert not found.within
    assert found.worst is not None
    assert found.worst > found.allowed["worst"]
    assert found.ratio is not None
    assert found.allowed["ratio_low"] <= found.ratio <= found.allowed["ratio_high"]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_with_nan_or_infinity_are_counted_and_fail(value: float) -> None:
    layer = layer_of("bf16")
    found = damaged(layer, lambda rows: rows[3:10:6, 7].fill_(value))
    assert (found.nan_rows, found.ratio, found.bias, found.worst, found.within) == (2, None, None, None, False)


def test_zero_reference_rows_require_zero_rows() -> None:
    exact = torch.zeros(2, 64)
    yardstick = Yardstick(exact, Ideal(exact.bfloat16(), exact, exact[:, :2]), SURE)
    assert yardstick.measure(exact.bfloat16()).within
    wrong = exact.bfloat16()
    wrong[1, 1] = 2.0**-40
    found = yardstick.measure(wrong)
    assert not found.within
    assert found.worst is None


def test_error_bounds_widen_with_fewer_rows() -> None:
    layer = layer_of("bf16")
    yardstick = layer.yardstick(Roundings())
    rows = layer.run({})
    some = torch.arange(ROWS) < 2
    few, all_of_them = yardstick.part(some).measure(rows[some]), yardstick.measure(rows)
    assert few.rows == 2
    assert few.within
    assert few.allowed["ratio_high"] > all_of_them.allowed["ratio_high"]
    assert few.allowed["ratio_low"] < all_of_them.allowed["ratio_low"]
    assert yardstick.part(torch.ones(ROWS, dtype=torch.bool)) is yardstick


def test_fp8_rows_that_are_quantised_twice_are_outside_the_bounds() -> None:
    """The reference is the dequantised rows as sent, so a second rounding is an error."""
    layer = layer_of("fp8")
    family = Roundings(weights="e4m3fn", intermediate="e4m3fn")
    assert layer.batch.scales is not None
    again, scales = quantize_fp8_blocks(self_of(layer).bfloat16() * 0.97, layer.batch.hidden.dtype)
    assert (
        not layer.yardstick(family)
        .measure(layer.run({}, batch=layer.batch._replace(hidden=again, scales=scales)))
        .within
    )


def self_of(layer: Layer) -> Tensor:
    return layer.workload.numerics.hidden_states(torch.arange(ROWS), layer.batch.ids).float()


@pytest.mark.parametrize("columns", [1, 3, 40])
@pytest.mark.parametrize("rows", [1, 2, 9])
def test_a_few_elements_added_in_any_order_are_within_bounds(rows: int, columns: int) -> None:
    """Eight routes that cancel, of which the ideal's order happens to lose next to nothing in some draws."""
    chance = torch.Generator().manual_seed(rows * 64 + columns)
    for _ in range(400):
        shares = torch.rand(rows, 8, 1, generator=chance)
        routes = (torch.randn(rows, 8, columns, generator=chance) * shares).bfloat16()
        exact, none = routes.double().sum(1).float(), torch.zeros(rows, columns)
        yardstick = Yardstick(exact, summed(routes, none, Roundings(sums="bf16")), SURE)
        actual = torch.zeros_like(routes[:, 0])
        for slot in torch.randperm(8, generator=chance).tolist():
            actual = actual + routes[:, slot]
        found = yardstick.measure(actual)
        assert found.within, found


def test_a_few_elements_are_not_excused_for_an_error_of_their_own_size() -> None:
    chance = torch.Generator().manual_seed(0)
    routes = torch.randn(1, 8, 1, generator=chance).bfloat16()
    exact, none = routes.double().sum(1).float(), torch.zeros(1, 1)
    yardstick = Yardstick(exact, summed(routes, none, Roundings(sums="bf16")), SURE)
    found = yardstick.measure((exact + 0.5 * routes.float().abs().max()).bfloat16())
    assert not found.within, found


@pytest.mark.timeout(3600)
@pytest.mark.skipif("DISTBENCH_SOAK" not in os.environ, reason="long; set DISTBENCH_SOAK=1")
def test_correct_kernels_stay_within_bounds_over_random_shapes_and_families() -> None:
    """Bounds are exceeded in one case in a million, so correct kernels must not exceed them here."""
    rng = random.Random(os.environ["DISTBENCH_SOAK"])
    measured = 0
    for seed in range(300):
        dtype: Literal["bf16", "fp8"] = rng.choice(["bf16", "fp8"])
        hidden = rng.choice([128, 256, 384]) if dtype == "fp8" else rng.choice([1, 8, 32, 64, 96, 192, 320])
        layer = Layer(dtype, seed, hidden, rng.choice([16, 32, 96, 128, 200, 256]))
        for values in KERNELS.values():
            family = roundings_of(tiny_case(2, dispatch_dtype=dtype), chosen(**values))
            rows = layer.run(values)
            some = torch.rand(ROWS, generator=torch.Generator().manual_seed(seed)) < rng.choice([0.02, 0.1, 1.0])
            for kept in (torch.ones_like(some), some):
                found = layer.yardstick(family).part(kept).measure(rows[kept])
                assert found.within, (seed, dtype, values, found)
                measured += 1
    assert measured == 300 * len(KERNELS) * 2


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_ideal_of_a_rank_that_receives_no_row_is_empty(dtype: Literal["bf16", "fp8"]) -> None:
    layer = Layer(dtype, hidden=128, inter=128)
    hidden, scales, weights, ids = layer.batch
    none = TokenBatch(hidden[:0], None if scales is None else scales[:0], weights[:0], ids[:0])
    exact, (ideal,) = ideal_rows(none, layer.weights, [Roundings()])
    assert exact.shape == ideal.rows.shape == ideal.variance.shape == (0, 128)
