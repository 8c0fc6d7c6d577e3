"""What a graph of the whole layer, and shared devices, refuse before a rank starts."""

from __future__ import annotations

from typing import Any

import pytest

from distbench.case.resolve import Layer, typed_value
from distbench.errors import InvalidCase, Unsupported
from distbench.launcher.preflight import check_case, check_devices
from distbench.utils.devices import devices_to_hold, runs_on_device
from tests.cases import tiny_case

LAYER = {"graph": "layer", "device": "cuda", "experts": "triton"}


@pytest.mark.parametrize(
    ("keys", "told"),
    [
        ({"transport": "collective"}, "graph = layer with transport collective: it sends rows by the counts of the"),
        ({"transport": "mori", "emulate": True}, "graph = layer with transport mori, emulated: the stand-in works on"),
        ({"transport": "symmetric", "inject": "stale-slot"}, "graph = layer with inject: a replay calls no fault"),
    ],
)
def test_graph_of_a_layer_that_cannot_be_captured_is_refused_with_the_reason(keys: dict[str, Any], told: str) -> None:
    with pytest.raises(Unsupported, match=told):
        check_case(tiny_case(2, **LAYER, **keys))


def test_graph_of_a_layer_over_symmetric_memory_is_taken() -> None:
    check_case(tiny_case(2, **LAYER, transport="symmetric"))


@pytest.mark.parametrize(
    ("raw", "value"),
    [("experts", True), ("true", True), ("layer", "layer"), ("false", False), (True, True), (False, False)],
)
def test_graph_is_a_flag_or_the_name_of_a_part(raw: Any, value: Any) -> None:
    assert typed_value("graph", raw, Layer("test", {}, strict=not isinstance(raw, str))) == value


def test_graph_of_another_part_is_invalid() -> None:
    with pytest.raises(InvalidCase, match="graph = 'combine': allowed are experts, layer"):
        typed_value("graph", "combine", Layer("test", {}, strict=False))


def test_ranks_that_share_devices_need_one_device() -> None:
    assert runs_on_device("cuda", 1, 4, shared=True)
    assert not runs_on_device("auto", 0, 4, shared=True)
    assert not runs_on_device("auto", 1, 4)
    with pytest.raises(Unsupported, match="add --share-devices"):
        runs_on_device("cuda", 1, 4)
    with pytest.raises(Unsupported, match="torch sees no device"):
        runs_on_device("cuda", 0, 4, shared=True)
    assert len(devices_to_hold(["cuda"], 4, 2, shared=True)) == 2


def test_launch_holds_devices_that_any_case_shares() -> None:
    shared, alone = tiny_case(4, device="cuda", share_devices=True), tiny_case(4, device="auto")
    assert len(check_devices([shared, alone], 4, 1)) == 1
    assert check_devices([alone], 4, 1) == ()


def test_every_output_of_shared_devices_says_so() -> None:
    case = tiny_case(2, device="cuda", share_devices=True, transport="symmetric")
    assert case.stand_ins[-1] == "ranks that share devices"


@pytest.mark.parametrize(
    ("keys", "error", "told"),
    [
        ({"device": "cpu"}, InvalidCase, "share_devices: device = cpu has none to share"),
        ({"device": "cuda", "transport": "mori"}, Unsupported, "share_devices with transport mori|no package mori"),
    ],
)
def test_shared_devices_are_refused_where_there_are_none(
    keys: dict[str, Any], error: type[Exception], told: str
) -> None:
    with pytest.raises(error, match=told):
        check_case(tiny_case(2, share_devices=True, **keys))


def test_fault_of_the_kernels_is_refused_with_another_transport() -> None:
    with pytest.raises(Unsupported, match="inject = stale-slot: of transport symmetric alone; the case has collective"):
        check_case(tiny_case(2, inject="stale-slot"))
