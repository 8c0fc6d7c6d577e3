"""Experts of vLLM and SGLang over fakes of both: bits, errors of the stated roundings, names, and what is refused."""

from __future__ import annotations

import sys
from typing import Any

import msgspec
import pytest
import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.errors import InvalidCase, Unsupported
from distbench.experts import make_experts
from distbench.experts.base import ExpertInput, ExpertWeights
from distbench.pipeline.inputs import workload_for
from distbench.transport.base import poison_
from distbench.verify.ideal import ideal_rows
from distbench.workload.batch import TokenBatch
from tests import fake_guests
from tests.cases import tiny_case

CPU = torch.device("cpu")
GUESTS = [("vllm", ""), ("sglang-triton", "")]
DEEP_GEMM = "kernel=DeepGemmExperts"


@pytest.fixture(autouse=True)
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_guests.install_vllm(monkeypatch)
    fake_guests.install_sglang(monkeypatch)


def guest(experts: str, option: str = "", **values: Any) -> Case:
    return tiny_case(2, experts=experts, experts_option=option, tokens=(9, 9), **values)


def parts_of(case: Case) -> tuple[TokenBatch, ExpertWeights]:
    """The tokens of rank 0, half of whose experts are elsewhere, and its weights."""
    workload = workload_for(case, CPU)
    mask = torch.zeros(case.num_experts, dtype=torch.int32)
    mask[: case.experts_per_rank] = 1
    return workload.tokens(0), ExpertWeights(*workload.local_weights(0), mask)


def rows_of(case: Case) -> Tensor:
    """Expert rows of 9 live rows, the last of which has an id of no expert, and 3 rows of poison behind them."""
    batch, weights = parts_of(case)
    live = len(batch.ids)
    batch.ids[-1, 0] = -1
    fields = [None if part is None else torch.cat([part, torch.empty_like(part[:3])]) for part in batch]
    for part in fields:
        if part is not None:
            poison_(part[live:])
    given = ExpertInput(*fields, torch.tensor([live], dtype=torch.int32))  # type: ignore[call-arg, arg-type]
    with torch.inference_mode():
        return make_experts(case)(given, weights)[:live].clone()


@pytest.mark.parametrize("topk", [4, 6])
@pytest.mark.parametrize(
    ("experts", "option", "dtype"),
    [*((*guest, dtype) for guest in GUESTS for dtype in ("bf16", "fp8")), ("vllm", DEEP_GEMM, "fp8")],
)
def test_exact_inputs_give_the_bits_of_the_reference(experts: str, option: str, dtype: str, topk: int) -> None:
    values: dict[str, Any] = {"dispatch_dtype": dtype, "topk": topk, "intermediate_size": 128}
    values |= {"model": "custom", "hidden_size": 256, "num_experts": 16}
    made, right = rows_of(guest(experts, option, **values)), rows_of(tiny_case(2, tokens=(9, 9), **values))
    assert torch.equal(made.view(torch.int16), right.view(torch.int16))


@pytest.mark.parametrize(("experts", "option"), GUESTS)
def test_gaussian_errors_are_those_of_the_stated_roundings(experts: str, option: str) -> None:
    case = msgspec.structs.replace(guest(experts, option, numerics="gaussian"), tokens=(96, 96))
    made = make_experts(case)
    stated = made.roundings(made.selection(1))
    assert stated is not None
    other = msgspec.structs.replace(stated, bf16_activation=not stated.bf16_activation)
    batch, weights = parts_of(case)
    exact, ideals = ideal_rows(batch, weights, [stated, other])
    given = ExpertInput(*batch, torch.tensor([96], dtype=torch.int32))
    error = (made(given, weights).double() - exact.double()).square().sum()
    mine, others = (float((ideal.rows.double() - exact.double()).square().sum()) for ideal in ideals)
    assert 0.95 < float(error) / mine < 1.05
    assert abs(others / mine - 1) > 0.05
    assert 0.8 < float(ideals[0].variance.double().sum()) / mine < 1.25


def test_no_rows_are_no_call() -> None:
    batch, weights = parts_of(guest("vllm"))
    given = ExpertInput(batch.hidden[:0], None, batch.weights[:0], batch.ids[:0], torch.tensor([3], dtype=torch.int32))
    for experts, _ in GUESTS:
        assert make_experts(guest(experts))(given, weights).shape == (0, 256)


def test_kernel_is_named_by_the_tiles_that_its_rows_choose() -> None:
    few, many = (make_experts(guest("vllm")).selection(rows).label for rows in (8, 99))
    assert few == "vllm TritonExperts m16 n64 k32 g1"
    assert many == "vllm TritonExperts m64 n64 k32 g1"
    few, many = (make_experts(guest("sglang-triton")).selection(rows).label for rows in (8, 99))
    assert few == "sglang fused_experts m16 n64 k32 g1 compiled sum"
    assert many == "sglang fused_experts m64 n64 k32 g1 then m16 n64 k32 g1"
    case = guest("vllm", DEEP_GEMM, dispatch_dtype="fp8", model="custom", **_sizes())
    assert make_experts(case).selection(8).label == "vllm DeepGemmExperts for 8 rows"


def _sizes(**values: Any) -> dict[str, Any]:
    return {"hidden_size": 256, "intermediate_size": 128, "num_experts": 16, "topk": 4, **values}


def test_scales_of_vllm_follow_what_deep_gemm_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    case = guest("vllm", dispatch_dtype="fp8", model="custom", **_sizes())
    experts = make_experts(case)
    stated = experts.roundings(experts.selection(1))
    assert stated is not None
    assert (stated.scales, stated.bf16_intermediate, stated.bf16_activation) == ("power of two", True, True)
    fake_guests.install_vllm(monkeypatch, is_deep_gemm_e8m0_used=lambda: False)
    experts = make_experts(case)
    stated = experts.roundings(experts.selection(1))
    assert stated is not None
    assert (stated.scales, stated.bf16_intermediate, stated.bf16_activation) == ("maximum", False, False)


def test_settings_are_given_to_sglang_once_and_never_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    given = fake_guests.install_sglang(monkeypatch)
    make_experts(guest("sglang-triton"))
    make_experts(guest("sglang-triton"))
    assert [one.model_path for one in given] == ["dummy"]


@pytest.mark.parametrize(
    ("experts", "option", "values", "told"),
    [
        ("vllm", "", {"activation": "gelu"}, "activation gelu: they are called for SiLU"),
        ("sglang-triton", "", {"bias": True}, "bias: they are called for"),
        ("vllm", "", {"doweight_stage1": True}, "doweight_stage1"),
        ("vllm", "", {"dispatch_dtype": "fp8", "fp8_format": "e4m3fnuz", **_sizes()}, "fp8_format e4m3fnuz"),
        ("vllm", "", {"dispatch_dtype": "fp8", **_sizes(intermediate_size=64)}, "intermediate_size 64 with fp8"),
        ("vllm", DEEP_GEMM, {}, "dispatch_dtype = bf16: DeepGemmExperts take fp8 rows"),
        ("vllm", DEEP_GEMM, {"dispatch_dtype": "fp8", **_sizes(hidden_size=1152)}, "hidden_size = 1152"),
    ],
)
def test_layer_that_a_guest_does_not_compute_is_unsupported(
    experts: str, option: str, values: dict[str, Any], told: str
) -> None:
    given = {"model": "custom"} | values if "num_experts" in values else values
    with pytest.raises(Unsupported, match=told):
        make_experts(guest(experts, option, **given))


def test_unknown_option_is_refused() -> None:
    with pytest.raises(InvalidCase, match="kernel=Marlin"):
        make_experts(guest("vllm", "kernel=Marlin"))


def test_missing_package_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("vllm", "sglang"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Unsupported, match=r"install a vllm of 0\.22 or later"):
        make_experts(guest("vllm"))
    with pytest.raises(Unsupported, match=r"install an sglang from 0\.5\.12 to 0\.5\.14"):
        make_experts(guest("sglang-triton"))


def test_release_of_sglang_that_takes_no_settings_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    def retired() -> None:
        message = "get_global_server_args() is retired"
        raise RuntimeError(message)

    fake_guests.install_sglang(monkeypatch, get_global_server_args=retired)
    with pytest.raises(Unsupported, match=r"get_global_server_args\(\) is retired; install an sglang"):
        make_experts(guest("sglang-triton"))


def test_deep_gemm_without_a_device_for_it_is_unsupported(monkeypatch: pytest.MonkeyPatch) -> None:
    fake_guests.install_vllm(monkeypatch, is_deep_gemm_supported=lambda: False)
    with pytest.raises(Unsupported, match="DeepGEMM is missing"):
        make_experts(guest("vllm", DEEP_GEMM, dispatch_dtype="fp8", model="custom", **_sizes()))
