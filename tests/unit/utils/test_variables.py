"""Environment variables that hold numbers: what is taken, and how the rest is refused."""

from __future__ import annotations

from typing import Any

import pytest

from distbench.cli.torchrun_rank import world_size
from distbench.distributed.in_group import _launched_here
from distbench.errors import InvalidCase
from distbench.experts.aiter.package import check_settings
from distbench.launcher.preflight import check_case
from distbench.transport.deepep.package import Package
from distbench.transport.mori.config import check_environment
from distbench.utils.devices import compute_units
from distbench.utils.variables import SHARED_MEMORY, shares_memory, whole
from tests.cases import tiny_case

TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "1",
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "0",
    "GROUP_WORLD_SIZE": "1",
}
NOT_COUNTS = ("abc", "-1", "1.5", "1e3", "٣", "9" * 5000)


@pytest.mark.parametrize(("text", "number"), [("0", 0), ("1024", 1024), (" 7 ", 7)])
def test_whole_number_of_a_variable_is_taken(text: str, number: int) -> None:
    assert whole("DEPTH", text) == number


@pytest.mark.parametrize("text", ["", *NOT_COUNTS])
def test_any_other_text_is_refused_with_variable_value_bound_and_fix(text: str) -> None:
    with pytest.raises(InvalidCase) as refusal:
        whole("DEPTH", text, fix="unset it")
    message = str(refusal.value)
    assert message.startswith(f"env:DEPTH = '{text[:20]}")
    assert message.endswith("allowed are whole numbers from 0 up; unset it")
    assert len(message) < 160


def test_number_below_the_least_is_refused() -> None:
    with pytest.raises(InvalidCase, match="whole numbers from 1 up"):
        whole("DEPTH", "0", least=1)


@pytest.mark.parametrize("text", NOT_COUNTS)
@pytest.mark.parametrize("name", [name for name in TORCHRUN if name != "TORCHELASTIC_RUN_ID"])
def test_number_of_torchrun_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    for variable, value in {**TORCHRUN, name: text}.items():
        monkeypatch.setenv(variable, value)
    with pytest.raises(InvalidCase, match=f"env:{name} = "):
        world_size()


@pytest.mark.parametrize("name", [name for name in TORCHRUN if name != "TORCHELASTIC_RUN_ID"])
def test_missing_number_of_torchrun_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    for variable, value in TORCHRUN.items():
        monkeypatch.setenv(variable, value)
    assert world_size() == 2
    monkeypatch.delenv(name)
    with pytest.raises(InvalidCase, match=f"env:{name} = ''"):
        world_size()


@pytest.mark.parametrize("text", NOT_COUNTS)
def test_packages_numbers_are_refused_by_name(text: str) -> None:
    with pytest.raises(InvalidCase, match="env:AITER_KSPLIT = "):
        check_settings(tiny_case(2), {"AITER_KSPLIT": text})
    with pytest.raises(InvalidCase, match="env:MORI_FP8_COMBINE_SCALE_DIM = "):
        check_environment({"MORI_FP8_COMBINE_SCALE_DIM": text})
    with pytest.raises(InvalidCase, match="env:CU_NUM = "):
        compute_units({"CU_NUM": text})


@pytest.mark.parametrize("text", ["", "0", *NOT_COUNTS])
def test_queue_depth_of_deep_ep_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("NVSHMEM_QP_DEPTH", text)
    group: Any = None
    with pytest.raises(InvalidCase, match=r"env:NVSHMEM_QP_DEPTH = .*whole numbers from 4 up; correct or unset it"):
        Package.__new__(Package).low_latency(group, ranks=2, tokens=8, hidden=512, experts=16)


@pytest.mark.parametrize("text", ["0", *NOT_COUNTS])
def test_ranks_of_the_host_are_refused_by_name(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", text)
    with pytest.raises(InvalidCase, match=r"env:LOCAL_WORLD_SIZE = .*whole numbers from 1 up"):
        _launched_here(2)


@pytest.mark.parametrize("text", ["2", "off", "abc", " "])
def test_switch_of_shared_memory_is_refused_before_a_rank_starts(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    assert [shares_memory({SHARED_MEMORY: one}) for one in ("", "1", "0")] == [True, True, False]
    monkeypatch.setenv(SHARED_MEMORY, text)
    with pytest.raises(InvalidCase, match=f"env:{SHARED_MEMORY} = '{text}': allowed are 0 and 1"):
        check_case(tiny_case(2))


def test_unset_and_empty_numbers_of_packages_are_their_defaults() -> None:
    check_settings(tiny_case(2), {})
    check_settings(tiny_case(2), {"AITER_KSPLIT": ""})
    check_environment({"MORI_FP8_COMBINE_SCALE_DIM": ""})
    assert compute_units({"CU_NUM": "80"}) == 80
