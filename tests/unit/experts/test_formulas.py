"""Arguments of `fused_moe` that change the arithmetic: reference, stand-in, exact inputs and torch agree."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from distbench.case.spec import Case
from distbench.errors import InvalidCase, Unsupported
from distbench.experts import make_experts
from distbench.experts.aiter.adapter import make_aiter_experts
from distbench.experts.base import ExpertInput, Experts, ExpertWeights
from distbench.experts.roundings import roundings_of
from distbench.launcher.preflight import check_case
from distbench.pipeline.inputs import workload_for
from distbench.verify.error_bounds import Yardstick, sure
from distbench.verify.ideal import ideal_rows
from distbench.workload.batch import TokenBatch
from tests.cases import tiny_case

CASES: dict[str, dict[str, Any]] = {
    "gelu": {"activation": "gelu"},
    "gelu fp8": {"activation": "gelu", "dispatch_dtype": "fp8", "fp8_format": "e4m3fnuz"},
    "swiglu": {"activation": "swiglu"},
    "silu limited": {"swiglu_limit": 10},
    "bias": {"bias": True},
    "bias fp8": {"bias": True, "dispatch_dtype": "fp8", "fp8_format": "e4m3fnuz"},
    "weights first": {"doweight_stage1": True},
    "weights first fp8": {"doweight_stage1": True, "dispatch_dtype": "fp8", "fp8_format": "e4m3fnuz"},
    "gpt-oss": {"activation": "swiglu", "bias": True, "hidden_size": 384, "intermediate_size": 384},
    "padded": {"hidden_size": 384, "hidden_pad": 100, "intermediate_size": 256, "intermediate_pad": 70},
    "padded fp8": {
        "hidden_size": 384,
        "hidden_pad": 128,
        "intermediate_size": 256,
        "intermediate_pad": 128,
        "dispatch_dtype": "fp8",
        "fp8_format": "e4m3fnuz",
    },
    "gpt-oss padded": {
        "activation": "swiglu",
        "bias": True,
        "hidden_size": 384,
        "hidden_pad": 192,
        "intermediate_size": 256,
        "intermediate_pad": 64,
    },
    "all": {"activation": "swiglu", "bias": True, "doweight_stage1": True},
}
LIMITS = {"silu limited": 0.75}
"""Limits that gaussian values pass."""


def layer_of(case: Case) -> tuple[TokenBatch, ExpertWeights, Tensor | None]:
    """What rank 1 may receive, its weights, and its right rows if inputs are exact."""
    workload = workload_for(case, torch.device("cpu"))
    batch = workload.tokens(0)
    mask = torch.zeros(case.num_experts, dtype=torch.int32)
    mask[case.experts_per_rank : 2 * case.experts_per_rank] = 1
    weights = ExpertWeights(*workload.local_weights(1), mask, *(workload.local_biases(1) or ()))
    return batch, weights, workload.expected_rows(1, batch)


def rows_of(experts: Experts, batch: TokenBatch, weights: ExpertWeights) -> Tensor:
    live = torch.tensor([len(batch.ids)], dtype=torch.int32)
    return experts(ExpertInput(*batch, live), weights).clone()


def asked(name: str, **changed: Any) -> Case:
    return tiny_case(2, **{"tokens": 40, "num_experts": 8, **CASES[name], **changed})


@pytest.mark.parametrize("name", CASES)
def test_reference_and_stand_in_give_the_bits_of_the_exact_oracle(name: str) -> None:
    case = asked(name)
    batch, weights, expected = layer_of(case)
    assert expected is not None
    emulated = asked(name, experts="aiter", emulate=True)
    for experts in (make_experts(case), make_aiter_experts(emulated)):
        assert torch.equal(rows_of(experts, batch, weights).view(torch.int16), expected.view(torch.int16))


def by_torch(case: Case, batch: TokenBatch, weights: ExpertWeights) -> Tensor:
    """Rows in float64, by torch's functions alone."""
    hidden = batch.hidden.double()
    total = torch.zeros_like(hidden)
    for number, (w1, w2) in enumerate(zip(weights.w1.double(), weights.w2.double(), strict=True)):
        share = ((batch.ids == number + case.experts_per_rank) * batch.weights.double()).sum(1, keepdim=True)
        first = functional.linear(hidden, w1) * (share if case.doweight_stage1 else 1)
        first = first if weights.bias1 is None else first + weights.bias1[number]
        gate, up = first.chunk(2, dim=1)
        limit = case.swiglu_limit or (7.0 if case.activation == "swiglu" else float("inf"))
        gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
        middle = {
            "silu": functional.silu(gate) * up,
            "gelu": functional.gelu(gate) * up,
            "swiglu": gate * torch.sigmoid(gate * 1.702) * (up + 1),
        }[case.activation]
        result = functional.linear(middle, w2, None if weights.bias2 is None else weights.bias2[number].double())
        total += result * ((share > 0) if case.doweight_stage1 else share)
    return total


@pytest.mark.parametrize("name", [name for name, keys in CASES.items() if "dispatch_dtype" not in keys])
def test_reference_is_within_the_ideal_of_its_format_and_close_to_torch(name: str) -> None:
    keys: dict[str, Any] = {"swiglu_limit": LIMITS[name]} if name in LIMITS else {}
    if "hidden_pad" not in CASES[name]:
        keys |= {"hidden_size": 512, "intermediate_size": 256}
    case = asked(name, numerics="gaussian", **keys)
    batch, weights, _ = layer_of(case)
    experts = make_experts(case)
    made = rows_of(experts, batch, weights)
    truth = by_torch(case, batch, weights)
    assert float((made.double() - truth).abs().max()) <= 2.0**-6 * float(truth.abs().max())
    exact, (ideal,) = ideal_rows(batch, weights, [roundings_of(case, experts.selection(40))])
    assert float((exact.double() - truth).abs().max()) <= 2.0**-20 * float(truth.abs().max())
    found = Yardstick(exact, ideal, sure(1000)).measure(made)
    assert found.within, found
    assert found.ratio is not None
    assert 0.98 <= found.ratio <= 1.02


def test_call_has_the_arguments_by_the_wheels_names() -> None:
    case = asked("silu limited", experts="aiter", emulate=True, sorting_policy=2)
    batch, weights, _ = layer_of(case)
    experts = make_aiter_experts(case)
    given = ExpertInput(*batch, torch.tensor([40], dtype=torch.int32))
    made = experts.arguments(given, weights)
    assert made["swiglu_limit"] == 10.0
    assert made["moe_sorting_dispatch_policy"] == 2
    assert made["activation"] is experts.package.root.ActivationType.Silu
    plain = make_aiter_experts(tiny_case(2, experts="aiter", emulate=True)).arguments(given, weights)
    assert "swiglu_limit" not in plain
    gelu = make_aiter_experts(asked("gelu", experts="aiter", emulate=True))
    assert gelu.arguments(given, weights)["activation"] is gelu.package.root.ActivationType.Gelu


@pytest.mark.parametrize("numerics", ["exact", "gaussian"])
def test_padding_is_zero_and_is_multiplied_by_weights_that_are_not(numerics: str) -> None:
    case = asked("gpt-oss padded", numerics=numerics)
    batch, weights, expected = layer_of(case)
    made = rows_of(make_experts(case), batch, weights)
    assert weights.bias1 is not None
    assert weights.bias2 is not None
    assert not bool(batch.hidden[:, 192:].any() | made[:, 192:].any() | weights.bias2[:, 192:].any())
    for half in (*weights.w1.chunk(2, dim=1), *(part.unsqueeze(2) for part in weights.bias1.chunk(2, dim=1))):
        assert not bool(half[:, 192:].any())
    assert bool((weights.w1[:, :192, 192:] != 0).all() & (weights.w2[:, :192, 192:] != 0).all())
    stale = batch._replace(hidden=batch.hidden.clone())
    stale.hidden[:, -1] = 1
    assert not torch.equal(rows_of(make_experts(case), stale, weights), made)
    assert (expected is None) == (numerics == "gaussian")


@pytest.mark.parametrize("name", ["hidden", "intermediate"])
def test_padding_of_all_columns_is_invalid(name: str) -> None:
    with pytest.raises(InvalidCase, match=f"{name}_pad = 384: {name}_size counts it and is 384; use at most 383"):
        asked("gpt-oss", **{f"{name}_pad": 384})


def test_stand_in_takes_every_argument_by_position_or_keyword() -> None:
    case = asked("gpt-oss", experts="aiter", emulate=True, doweight_stage1=True)
    batch, weights, expected = layer_of(case)
    experts = make_aiter_experts(case)
    named = experts.arguments(ExpertInput(*batch, torch.tensor([40], dtype=torch.int32)), weights)
    fused_moe = experts.package.moe.fused_moe
    defaults = {name: one.default for name, one in inspect.signature(fused_moe).parameters.items()}
    made = fused_moe(*(defaults | named).values()).clone()
    assert expected is not None
    assert torch.equal(made.view(torch.int16), expected.view(torch.int16))
    for name in ("activation", "doweight_stage1", "bias1", "bias2"):
        other = fused_moe(**{key: value for key, value in named.items() if key != name})
        changes = name != "doweight_stage1"  # with a bias all weights of exact inputs are 1
        assert torch.equal(other.view(torch.int16), expected.view(torch.int16)) != changes, name
    with pytest.raises(TypeError, match="MoE bias must be fp32"):
        fused_moe(**named | {"bias1": named["bias1"].bfloat16()})


def test_limit_is_unsupported_before_the_release_that_takes_it() -> None:
    case = asked("silu limited", experts="aiter", emulate=True, aiter_version="0.1.16")
    with pytest.raises(Unsupported, match=r"swiglu_limit = 10: fused_moe of aiter 0\.1\.16 .* use 0\.1\.17"):
        make_aiter_experts(case)


@pytest.mark.parametrize("name", ["gelu", "swiglu", "silu limited", "bias", "weights first"])
def test_triton_experts_refuse_what_they_do_not_compute(name: str) -> None:
    with pytest.raises(Unsupported, match=r"experts triton: .*use experts reference or aiter"):
        check_case(asked(name, experts="triton"))


@pytest.mark.parametrize("keys", [{"activation": "relu"}, {"swiglu_limit": -1}, {"sorting_policy": 3}])
def test_value_outside_its_bounds_is_invalid(keys: dict[str, Any]) -> None:
    with pytest.raises(InvalidCase, match=next(iter(keys))):
        tiny_case(2, **keys)
