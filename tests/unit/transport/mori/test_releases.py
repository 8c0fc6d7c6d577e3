"""Rules of MoRI by release: AsyncLL's buffers, variables that the constructor refuses, and SGLang's clamp of a grid."""

from __future__ import annotations

import importlib.metadata
from typing import Any

import pytest

from distbench.case.spec import Case
from distbench.errors import Unsupported
from distbench.launcher.preflight import check_case
from distbench.launcher.unused_variables import unused_variables
from distbench.transport.mori.config import Launch, plan_mori
from distbench.transport.mori.releases import async_buffers, reads_atomics_switch, version_for
from tests.cases import tiny_case

NIGHTLY = "1.2.5.dev20261026"
RAIL = {"MORI_ENABLE_RAIL_ONLY": "1"}
RELAXED = {"MORI_EP_DISABLE_RDMA_ATOMICS": "on", "MORI_IB_ENABLE_RELAXED_ORDERING": "1"}


def case_of(ranks: int = 8, **values: Any) -> Case:
    return tiny_case(ranks, transport="mori", emulate=True, **values)


@pytest.mark.parametrize(
    ("version", "buffers", "switch"),
    [
        ("1.2.2", 3, False),
        ("1.2.4", 3, False),
        ("1.2.4+rocm7", 3, False),
        ("1.2.5.dev20261020", 3, False),
        ("1.2.5.dev20261024", 4, False),
        ("1.2.5.dev20261025", 4, False),
        (NIGHTLY, 4, True),
        ("1.2.5", 4, True),
        ("", 4, True),
        ("0+unknown", 4, True),
    ],
)
def test_buffers_of_asyncll_and_atomics_switch_follow_the_release(version: str, buffers: int, switch: bool) -> None:
    assert (async_buffers(version), reads_atomics_switch(version)) == (buffers, switch)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_heap_of_asyncll_grows_by_one_buffer_of_all_senders_rows_in_the_nightly(dtype: str) -> None:
    case = case_of(mori_kernel="AsyncLL", dispatch_dtype=dtype, model="deepseek-v3", tokens=1)
    old, new = (plan_mori(case, {}, version=version).heap_bytes for version in ("1.2.4", NIGHTLY))
    slot = case.hidden_size * 2 + 8 * case.topk + 4 + (case.hidden_size // 128 * 4 if dtype == "fp8" else 0)
    assert new - old == 8 * case.max_dispatch_tokens_per_rank * slot
    for kernel in ("IntraNode", "InterNodeV1LL"):
        other = case_of(mori_kernel=kernel, gpu_per_node=8 if kernel == "IntraNode" else 4)
        assert plan_mori(other, {}, version=NIGHTLY) == plan_mori(other, {}, version="1.2.4")


def test_version_is_that_of_the_stand_ins_quirks_or_of_the_installed_distribution(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert version_for(case_of()) == version_for(case_of(mori_habits="1.2.2")) == "1.2.4"
    assert version_for(case_of(mori_habits=NIGHTLY)) == version_for(case_of(mori_habits="atomics-switch")) == NIGHTLY
    assert version_for(case_of(mori_habits="staged-dispatch")) == "1.2.5.dev20261024"
    real = tiny_case(8, transport="mori")
    assert version_for(real) == ""

    def installed(name: str) -> str:
        if name != "amd-mori-nightly":
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.5.dev20261025"

    monkeypatch.setattr(importlib.metadata, "version", installed)
    assert version_for(real) == "1.2.5.dev20261025"


@pytest.mark.parametrize(
    ("values", "environ", "message"),
    [
        ({"mori_kernel": "AsyncLL"}, RAIL, "MORI_ENABLE_RAIL_ONLY = '1': AsyncLL on 2 nodes .* unset it, or use"),
        ({"mori_kernel": "AsyncLL"}, {"MORI_ENABLE_RAIL_ONLY": "yes"}, "MORI_ENABLE_RAIL_ONLY = 'yes'"),
        ({"mori_habits": NIGHTLY}, RELAXED, "DISABLE_RDMA_ATOMICS = 'on' with MORI_IB_.*: InterNodeV1LL on 2 nodes"),
        ({"mori_habits": NIGHTLY, "mori_kernel": "InterNodeV1"}, RELAXED, "InterNodeV1 on 2 nodes .* unset one"),
    ],
)
def test_variables_that_moris_constructor_refuses_are_unsupported(
    values: dict[str, Any], environ: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Unsupported, match=message):
        check_case(case_of(gpu_per_node=4, **values))


@pytest.mark.parametrize(
    ("values", "environ"),
    [
        ({"mori_kernel": "AsyncLL", "gpu_per_node": 8}, RAIL),
        ({"mori_kernel": "AsyncLL"}, {"MORI_ENABLE_RAIL_ONLY": "off"}),
        ({}, RAIL),
        ({}, RELAXED),
        ({"mori_habits": "1.2.5.dev20261026", "mori_kernel": "AsyncLL"}, RELAXED),
        ({"mori_habits": "1.2.5.dev20261026", "gpu_per_node": 8}, RELAXED),
        ({"mori_habits": "1.2.5.dev20261026"}, RELAXED | {"MORI_EP_DISABLE_RDMA_ATOMICS": "0"}),
        ({"mori_habits": "1.2.5.dev20261026"}, RELAXED | {"MORI_IB_ENABLE_RELAXED_ORDERING": "2"}),
    ],
)
def test_variables_that_moris_constructor_accepts_are_accepted(values: dict[str, Any], environ: dict[str, str]) -> None:
    plan_mori(case_of(**({"gpu_per_node": 4} | values)), environ)


def test_atomics_switch_is_listed_as_unused_before_the_nightly() -> None:
    environ = {"MORI_EP_DISABLE_RDMA_ATOMICS": "1"}
    (line,) = unused_variables(environ, case_of(), {})
    assert "(mori 1.2.4 does not read it, 1.2.5.dev20261026 and later do)" in line
    assert unused_variables(environ, case_of(mori_habits=NIGHTLY), {}) == ()


@pytest.mark.parametrize(
    ("units", "sglang", "kernel", "launch"),
    [
        (304, "", "IntraNode", Launch(80, 0, 16)),
        (80, "", "IntraNode", Launch(80, 0, 16)),
        (38, "", "IntraNode", Launch(38, 0, 16)),
        (38, "0.5.21", "IntraNode", Launch(38, 0, 16)),
        (38, "0.5.20", "IntraNode", Launch(80, 0, 16)),
        (38, "", "IntraNodeLL", Launch(80, 0, 16)),
        (38, "", "AsyncLL", Launch(64, 32, 8)),
    ],
)
def test_grid_of_intranode_is_clamped_to_the_compute_units_since_sglang_0_5_21(
    units: int, sglang: str, kernel: str, launch: Launch
) -> None:
    case = case_of(mori_kernel=kernel, cu_count=units, sglang_version=sglang)
    assert plan_mori(case, {}).launch == launch
    real = tiny_case(8, transport="mori", mori_kernel=kernel, sglang_version=sglang)
    assert plan_mori(real, {}, units=units).launch == launch
    assert plan_mori(real, {}).launch.blocks in (80, 64)


def test_emulated_grid_with_more_blocks_than_compute_units_is_unsupported() -> None:
    check_case(case_of(cu_count=38))
    check_case(case_of(cu_count=38, mori_kernel="IntraNodeLL", launch_mode="AUTO"))
    for values in ({"mori_kernel": "IntraNodeLL"}, {"sglang_version": "0.5.20"}, {"gpu_per_node": 4}):
        with pytest.raises(Unsupported, match=r"blocks have to run at once, the emulated device has 38 compute units"):
            check_case(case_of(cu_count=38, **values))
