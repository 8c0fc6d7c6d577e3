"""Keys of a case that it does not use are listed once; values that cannot be parsed are refused wherever they stand."""

from __future__ import annotations

from typing import Any

import pytest

from distbench.case.entry import Entry
from distbench.case.resolve import FLAGS
from distbench.case.suite import load_suite
from distbench.case.suite_file import builtin_suites
from distbench.case.unused_keys import note_of_keys, unused_keys
from distbench.errors import InvalidCase
from distbench.launcher.preflight import check_case
from tests.cases import tiny_case

MORI: dict[str, Any] = {"transport": "mori", "emulate": True}
AITER: dict[str, Any] = {"experts": "aiter", "emulate": True}
BOUND: dict[str, Any] = {"recv_bound": True, "limit": "off"}
COLLECTIVE = "transport collective does not use it"


@pytest.mark.parametrize(
    ("key", "value", "others", "reason"),
    [
        ("replica_choice", "static", {}, "no expert has a replica"),
        ("replica_choice", "static", {"physical_experts": 32}, ""),
        ("launch_mode", "AUTO", {}, COLLECTIVE),
        ("launch_mode", "AUTO", MORI, ""),
        ("combine_input", "registered", {}, COLLECTIVE),
        ("combine_input", "registered", MORI, ""),
        ("mori_habits", "stale-push", {}, COLLECTIVE),
        ("mori_habits", "stale-push", {"transport": "mori"}, "only with emulate"),
        ("mori_habits", "stale-push", MORI, ""),
        ("mori_kernel", "AsyncLL", {}, COLLECTIVE),
        ("mori_kernel", "AsyncLL", {"recv_bound": True, "limit": "8"}, COLLECTIVE),
        ("mori_kernel", "AsyncLL", BOUND, ""),
        ("gpu_per_node", 2, {}, COLLECTIVE),
        ("gpu_per_node", 2, BOUND, ""),
        ("inter_kernel_switch", 8, {}, COLLECTIVE),
        ("inter_kernel_switch", 8, BOUND, ""),
        ("slot_order", "source", {}, ""),
        ("slot_order", "source", MORI, "transport mori has an order of its own"),
        ("aiter_habits", "zero-rows", {}, "experts reference do not use it"),
        ("aiter_habits", "zero-rows", AITER, ""),
        ("aiter_ksplit", 2, {}, ""),
        ("aiter_ksplit", 2, {"experts": "triton"}, "experts triton have their own tables"),
        ("cu_count", 256, {"experts": "triton"}, "experts triton have their own tables"),
        ("cu_count", 256, {"experts": "triton", **MORI}, ""),
        ("emulate", True, {}, "neither mori nor aiter runs"),
        ("emulate", True, {"dispatch_dtype": "fp8", "hidden_size": 128}, ""),
        ("emulate", True, {"transport": "mori"}, ""),
        ("emulate", True, {"experts": "aiter"}, ""),
        ("recv_bound", True, {"limit": "8"}, "only with the limit off"),
        ("recv_bound", True, {"limit": "off"}, ""),
        ("warmup", 50, {}, "nothing is timed: iterations is 0"),
        ("warmup", 50, {"iterations": 1}, ""),
        ("seed", 7, {}, ""),
    ],
)
@pytest.mark.parametrize("source", [FLAGS, "file:a.toml", "suite:night"])
def test_key_that_the_case_does_not_use_is_listed_with_its_reason(
    key: str, value: Any, others: dict[str, Any], reason: str, source: str
) -> None:
    lines = unused_keys(tiny_case(4, **others, **{key: value}), {key: source})
    text = str(value).lower() if isinstance(value, bool) else value
    assert lines == ((f"keys set and not used by this case: {key}={text} ({reason})",) if reason else ())


@pytest.mark.parametrize("source", ["default", "env:MORI_ENABLE_SDMA", "preset:tiny", "device", ""])
def test_values_of_other_sources_are_not_listed(source: str) -> None:
    assert not unused_keys(tiny_case(4, mori_kernel="AsyncLL"), {"mori_kernel": source})


def test_key_with_its_default_value_is_not_listed() -> None:
    assert not unused_keys(tiny_case(4), dict.fromkeys(("launch_mode", "mori_kernel", "emulate"), "suite:mixed"))


def test_keys_of_one_reason_share_a_line() -> None:
    case = tiny_case(4, launch_mode="AUTO", combine_input="registered", aiter_habits="zero-rows")
    (line,) = unused_keys(case, dict.fromkeys(("launch_mode", "combine_input", "aiter_habits"), FLAGS))
    assert line == (
        "keys set and not used by this case: aiter_habits=zero-rows (experts reference do not use it); "
        f"combine_input=registered, launch_mode=AUTO ({COLLECTIVE})"
    )


def test_unused_keys_of_a_suite_are_listed_in_one_note_for_all_cases() -> None:
    mixed = [tiny_case(4, launch_mode="AUTO", seed=seed) for seed in range(3)]
    mixed += [tiny_case(4, launch_mode="AUTO", **MORI), tiny_case(4, launch_mode="AUTO", aiter_habits="zero-rows")]
    sources = {"launch_mode": "suite:mixed", "aiter_habits": FLAGS}
    entries = [Entry(name=str(number), case=case, sources=sources) for number, case in enumerate(mixed)]
    assert note_of_keys(entries) == (
        f"3 of 5 cases: keys set and not used by this case: launch_mode=AUTO ({COLLECTIVE}); reports have 1 other lists"
    )
    assert not note_of_keys(entries[3:4])


@pytest.mark.parametrize("name", builtin_suites())
def test_built_in_suites_set_no_key_in_vain(name: str) -> None:
    assert not note_of_keys(load_suite(name, 8).entries)


@pytest.mark.parametrize(
    "values",
    [
        {"mori_habits": "nonsense"},
        {"aiter_habits": "nonsense"},
        {"sender_rows": "many"},
        {"aiter_version": "newest", "experts": "triton"},
    ],
)
def test_malformed_value_of_an_unused_key_is_invalid(values: dict[str, Any]) -> None:
    with pytest.raises(InvalidCase, match=r"nonsense|many|newest"):
        check_case(tiny_case(4, **values))
