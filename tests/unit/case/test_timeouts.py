"""Time limits of stages."""

from __future__ import annotations

from typing import Any

import pytest

from distbench.case.entry import Entry
from distbench.case.timeouts import compiles, parse_stage_timeouts, stage_limit
from distbench.errors import InvalidCase
from distbench.launcher.job import Job
from distbench.launcher.worker import _group_timeout
from tests.cases import tiny_case


def test_stage_limit_overrides_are_exact_and_defaults_grow_with_the_work() -> None:
    small = tiny_case(timeout=2.0, stage_timeouts="dispatch=5, experts=0.5")
    assert stage_limit(small, "dispatch") == 5
    assert stage_limit(small, "experts") == 0.5
    assert 2 < stage_limit(small, "combine") < 2.1
    assert stage_limit(small, "agree") == 2
    large = tiny_case(timeout=2.0, hidden_size=2048, tokens=64)
    assert stage_limit(large, "experts") > stage_limit(tiny_case(timeout=2.0), "experts")


@pytest.mark.parametrize("text", ["dispatch", "dispatch=", "dispatch=0", "lunch=3", "experts=nan", "experts=1e9", "=3"])
def test_invalid_stage_limit_override_is_refused_with_its_text(text: str) -> None:
    with pytest.raises(InvalidCase, match="allowed is stage=seconds"):
        parse_stage_timeouts(text)
    with pytest.raises(InvalidCase, match="allowed is stage=seconds"):
        tiny_case(stage_timeouts=text)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({}, False),
        ({"experts": "triton"}, True),
        ({"experts": "aiter"}, True),
        ({"transport": "mori"}, True),
        ({"experts": "aiter", "transport": "mori", "emulate": True}, False),
        ({"experts": "triton", "transport": "mori", "emulate": True}, True),
    ],
)
def test_compile_limit_of_an_hour_applies_only_to_cases_that_compile(values: dict[str, Any], expected: bool) -> None:
    case = tiny_case(2, **values)
    assert compiles(case) is expected
    entry = Entry(name="one", case=case, sources={})
    assert (_group_timeout(Job(entries=(entry,), out="", supervised=False)) > 3600) is expected
