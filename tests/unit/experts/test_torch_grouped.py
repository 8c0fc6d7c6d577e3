"""Experts over torch's grouped product: bits of exact inputs, errors of gaussian ones, and what they refuse."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distbench.case.spec import Case
from distbench.errors import Unsupported
from distbench.experts import make_experts
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.experts.roundings import Roundings
from distbench.experts.torch_grouped import GroupedExperts
from distbench.pipeline.inputs import workload_for
from distbench.verify.ideal import ideal_rows
from distbench.workload.batch import TokenBatch
from tests.cases import tiny_case

CPU = torch.device("cpu")
FORMULAS: list[dict[str, Any]] = [
    {},
    {"bias": True},
    {"activation": "gelu"},
    {"activation": "swiglu", "bias": True},
    {"doweight_stage1": True},
]


def grouped(tokens: int = 9, **values: Any) -> Case:
    return tiny_case(2, experts="torch-grouped", tokens=(tokens, tokens), **values)


def parts_of(case: Case) -> tuple[TokenBatch, ExpertWeights]:
    """The tokens of rank 0, half of whose experts are elsewhere, and its weights."""
    workload = workload_for(case, CPU)
    mask = torch.zeros(case.num_experts, dtype=torch.int32)
    mask[: case.experts_per_rank] = 1
    return workload.tokens(0), ExpertWeights(*workload.local_weights(0), mask, *(workload.local_biases(0) or ()))


def rows_of(case: Case, live: int | None = None) -> Tensor:
    batch, weights = parts_of(case)
    total = len(batch.ids) if live is None else live
    given = ExpertInput(batch.hidden, None, batch.weights, batch.ids, torch.tensor([total], dtype=torch.int32))
    with torch.inference_mode():
        return make_experts(case)(given, weights)[:total].clone()


@pytest.mark.parametrize("formula", FORMULAS)
def test_exact_inputs_give_the_bits_of_the_reference(formula: dict[str, Any]) -> None:
    made, right = rows_of(grouped(**formula)), rows_of(tiny_case(2, tokens=(9, 9), **formula))
    assert torch.equal(made.view(torch.int16), right.view(torch.int16))


def test_more_live_rows_than_a_cut_has_left_are_those_that_are_left() -> None:
    batch, weights = parts_of(grouped())
    given = ExpertInput(batch.hidden[:4], None, batch.weights[:4], batch.ids[:4], torch.tensor([9], dtype=torch.int32))
    with torch.inference_mode():
        assert torch.equal(make_experts(grouped())(given, weights), rows_of(grouped())[:4])


@pytest.mark.parametrize("live", [0, 4])
def test_rows_past_the_live_ones_are_not_computed(live: int) -> None:
    assert torch.equal(rows_of(grouped(), live), rows_of(grouped())[:live])


@pytest.mark.parametrize("formula", FORMULAS)
def test_gaussian_errors_are_those_of_the_stated_roundings_and_not_of_float32_products(formula: dict[str, Any]) -> None:
    case = grouped(64, numerics="gaussian", **formula)
    experts = make_experts(case)
    stated = experts.roundings(experts.selection(1))
    assert stated is not None
    batch, weights = parts_of(case)
    exact, ideals = ideal_rows(batch, weights, [stated, Roundings(formula=stated.formula)])
    error = (rows_of(case).double() - exact.double()).square().sum()
    with_products, without = ((ideal.rows.double() - exact.double()).square().sum() for ideal in ideals)
    assert 0.9 < float(error / with_products) < 1.1
    assert float(error / without) > 1.15
    measured = [float(ideal.variance.double().sum()) for ideal in ideals]
    assert 0.8 < float(with_products) / measured[0] < 1.25
    assert measured[0] > measured[1]


def test_columns_that_are_no_whole_16_bytes_are_unsupported() -> None:
    case = tiny_case(
        1, experts="torch-grouped", model="custom", hidden_size=132, intermediate_size=64, num_experts=4, topk=2
    )
    with pytest.raises(Unsupported, match=r"hidden_size = 132: grouped_mm takes multiples of 8 columns"):
        make_experts(case)


def test_limit_after_rounded_products_is_unsupported_with_exact_inputs() -> None:
    with pytest.raises(Unsupported, match=r"swiglu_limit = 0.5: they round gate and up to bf16 before the limit"):
        make_experts(grouped(swiglu_limit=0.5))
    make_experts(grouped(swiglu_limit=0.5, numerics="gaussian"))


def test_torch_without_a_grouped_product_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(functional, "grouped_mm")
    with pytest.raises(Unsupported, match=r"torch \S+ has no grouped_mm"):
        GroupedExperts(grouped())


def test_guest_is_named_wherever_the_verdict_is_and_needs_no_flag() -> None:
    assert grouped().plugins == ["experts torch-grouped"]
    assert grouped().stand_ins == ["collective for mori"]
