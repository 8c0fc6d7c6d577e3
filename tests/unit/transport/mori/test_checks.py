"""Host checks that MoRI lacks, and the refusal of older packages."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any, NoReturn, cast

import pytest
import torch

from distbench.case.spec import Case
from distbench.errors import DistbenchError, Unsupported
from distbench.transport.mori.checks import check_batch, check_device, check_routing_is_own
from distbench.transport.mori.config import plan_mori
from distbench.transport.mori.transport import _configuration, _operator
from distbench.workload.batch import TokenBatch
from tests.cases import tiny_case

CPU = torch.device("cpu")


def mori_case(**values: Any) -> Case:
    return tiny_case(4, transport="mori", emulate=True, **values)


def good() -> dict[str, torch.Tensor | None]:
    return {
        "hidden": torch.zeros(3, 256).bfloat16(),
        "scales": None,
        "weights": torch.zeros(3, 4),
        "ids": torch.zeros(3, 4, dtype=torch.int32),
    }


@pytest.mark.parametrize(
    ("values", "changed", "message"),
    [
        ({}, {"ids": torch.zeros(3, 4, dtype=torch.int64)}, "ids are torch.int64 .* MoRI reads them as torch.int32"),
        ({}, {"ids": torch.zeros(4, 3, dtype=torch.int32).t()}, "ids are strided .* make them contiguous"),
        ({}, {"ids": torch.zeros(3, 5, dtype=torch.int32)}, r"ids are .*\[3, 5\]"),
        ({}, {"weights": None}, "weights are missing; IntraNode reads them"),
        ({}, {"weights": torch.zeros(3, 4).double()}, "weights are torch.float64"),
        ({}, {"hidden": torch.zeros(3, 128).bfloat16()}, r"hidden are .*\[3, 128\]"),
        ({}, {"hidden": torch.zeros(3, 512).bfloat16()[:, ::2]}, "hidden are strided"),
        ({"dispatch_dtype": "fp8"}, {}, "hidden are torch.bfloat16"),
        ({"max_dispatch_tokens_per_rank": 2}, {}, "3 tokens, max_dispatch_tokens_per_rank is 2; raise it"),
        ({"mori_kernel": "AsyncLL"}, {"ids": torch.full((3, 4), -1, dtype=torch.int32)}, "id -1: AsyncLL sends"),
        ({"mori_kernel": "InterNodeV1LL"}, {"ids": torch.full((3, 4), -1, dtype=torch.int32)}, "id -1"),
        *(
            (
                {"mori_kernel": kernel},
                {"ids": torch.full((3, 4), 16, dtype=torch.int32)},
                "id 16: the last expert is 15",
            )
            for kernel in ("IntraNode", "IntraNodeLL", "InterNodeV1", "InterNodeV1LL", "AsyncLL")
        ),
    ],
)
def test_batch_that_mori_would_misread_is_refused(
    values: dict[str, Any], changed: dict[str, Any], message: str
) -> None:
    case = mori_case(**values)
    plan = plan_mori(mori_case(**values, tokens=1), {})
    with pytest.raises(DistbenchError, match=message):
        check_batch(TokenBatch(**(good() | changed)), case, plan, CPU)


def test_tensors_of_another_device_of_the_same_kind_are_refused() -> None:
    elsewhere: dict[str, Any] = {name: None if one is None else one.to("meta") for name, one in good().items()}
    with pytest.raises(DistbenchError, match=r"hidden are strided .* on meta; make them contiguous on meta:1"):
        check_batch(TokenBatch(**elsewhere), mori_case(), plan_mori(mori_case(), {}), torch.device("meta", 1))


def device_of(monkeypatch: pytest.MonkeyPatch, arch: str, units: int = 304) -> torch.device:
    properties = SimpleNamespace(gcnArchName=arch, multi_processor_count=units)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: properties)
    return torch.device("cuda", 0)


def test_fp4_combine_requires_a_device_with_fp4(monkeypatch: pytest.MonkeyPatch) -> None:
    fp4 = plan_mori(mori_case(combine_quant="fp4_blockwise"), {})
    check_device(mori_case(), fp4, device_of(monkeypatch, "gfx950:sramecc+:xnack-"))
    check_device(mori_case(), plan_mori(mori_case(), {}), device_of(monkeypatch, "gfx942:sramecc+:xnack-"))
    with pytest.raises(
        Unsupported, match=r"fp4_blockwise: MoRI has it on gfx950 only, cuda:0 is gfx942; use fp8_block"
    ):
        check_device(mori_case(), fp4, device_of(monkeypatch, "gfx942:sramecc+:xnack-"))


@pytest.mark.parametrize("asked", [{"dispatch_dtype": "fp8"}, {"combine_quant": "fp8_blockwise"}])
def test_fp8_format_of_another_device_is_refused(monkeypatch: pytest.MonkeyPatch, asked: dict[str, str]) -> None:
    ocp, fnuz = (mori_case(**asked, fp8_format=one) for one in ("e4m3fn", "e4m3fnuz"))
    plan = plan_mori(ocp, {})
    check_device(ocp, plan, device_of(monkeypatch, "gfx950:sramecc+:xnack-"))
    check_device(fnuz, plan, device_of(monkeypatch, "gfx942:sramecc+:xnack-"))
    with pytest.raises(Unsupported, match="e4m3fn: MoRI's kernels for cuda:0, gfx942, have e4m3fnuz only; use that"):
        check_device(ocp, plan, device_of(monkeypatch, "gfx942:sramecc+:xnack-"))
    with pytest.raises(Unsupported, match="e4m3fnuz: MoRI's kernels for cuda:0, gfx950, have e4m3fn only; use that"):
        check_device(fnuz, plan, device_of(monkeypatch, "gfx950"))


def test_pinned_grid_larger_than_the_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    check_device(mori_case(), plan_mori(mori_case(), {}), device_of(monkeypatch, "gfx942", 80))
    small = device_of(monkeypatch, "gfx942", 79)
    check_device(mori_case(), plan_mori(mori_case(launch_mode="AUTO"), {}), small)
    with pytest.raises(Unsupported, match="80 blocks have to run at once, cuda:0 has 79 compute units"):
        check_device(mori_case(), plan_mori(mori_case(), {}), small)
    check_device(mori_case(), plan_mori(mori_case(cu_count=79), {}), small)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("invalid quant_type 'fp4_blockwise'"),
        NotImplementedError("no LL here"),
        RuntimeError("MORI_ENABLE_RAIL_ONLY is set, but kernelType=4"),
    ],
)
def test_error_of_mori_at_construction_is_unsupported(error: Exception) -> None:
    def refuse(_: object) -> NoReturn:
        raise error

    old = SimpleNamespace(ops=SimpleNamespace(EpDispatchCombineOp=refuse))
    with pytest.raises(Unsupported, match=f"the installed mori cannot run the case: {error}"):
        _operator(old, None, cast("Any", None))


def test_fault_at_construction_is_no_refusal() -> None:
    def fail(_: object) -> NoReturn:
        raise torch.OutOfMemoryError

    broken = SimpleNamespace(ops=SimpleNamespace(EpDispatchCombineOp=fail))
    with pytest.raises(torch.OutOfMemoryError):
        _operator(broken, None, cast("Any", None))


def test_ids_that_a_kernel_skips_pass_the_check() -> None:
    for kernel in ("IntraNode", "IntraNodeLL", "InterNodeV1"):
        case = mori_case(mori_kernel=kernel)
        batch: dict[str, Any] = good() | {"ids": torch.full((3, 4), -1, dtype=torch.int32)}
        check_batch(TokenBatch(**batch), case, plan_mori(case, {}), CPU)


def test_routing_is_compared_by_content_not_identity() -> None:
    routing = torch.arange(12, dtype=torch.int32).view(3, 4)
    check_routing_is_own(routing.clone(), routing)
    with pytest.raises(DistbenchError, match=r"ids of token 0 are \[8, 9, 10, 11\], dispatched were \[0, 1, 2, 3\]"):
        check_routing_is_own(routing.roll(1, 0), routing)
    with pytest.raises(DistbenchError, match=r"have 2 rows, this rank dispatched 3 tokens"):
        check_routing_is_own(routing[:2], routing)


def test_older_mori_without_a_requested_option_is_refused_with_its_version() -> None:
    case = mori_case(prealloc_max_recv_tokens=64, combine_input="registered")
    plan = plan_mori(case, {})
    known = [name for name in plan.values(case, 0) if name != "max_total_recv_tokens"]
    config = dataclasses.make_dataclass("EpDispatchCombineConfig", ["data_type", "kernel_type", *known])
    old = SimpleNamespace(ops=SimpleNamespace(EpDispatchCombineConfig=config, EpDispatchCombineKernelType=object()))
    with pytest.raises(Unsupported, match=r"mori_kernel = IntraNode: the installed mori has none"):
        _configuration(old, case, plan, 0)
    old.ops.EpDispatchCombineKernelType = SimpleNamespace(IntraNode=0)
    with pytest.raises(Unsupported, match=r"configuration has no max_total_recv_tokens; install amd-mori 1.2.4"):
        _configuration(old, case, plan, 0)
    uncapped = mori_case()
    assert _configuration(old, uncapped, plan_mori(uncapped, {}), 0).world_size == 4
