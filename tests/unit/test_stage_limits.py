"""Time limits of stages."""

from __future__ import annotations

import pytest

from distbench.errors import InvalidCase
from distbench.stage_limits import parse_stage_timeouts, stage_limit
from tests.cases import tiny_case


def test_overrides_are_exact_and_others_grow_with_the_work() -> None:
    small = tiny_case(timeout=2.0, stage_timeouts="dispatch=5, experts=0.5")
    assert stage_limit(small, "dispatch") == 5
    assert stage_limit(small, "experts") == 0.5
    assert 2 < stage_limit(small, "combine") < 2.1
    assert stage_limit(small, "agree") == 2
    large = tiny_case(timeout=2.0, hidden_size=2048, tokens=64)
    assert stage_limit(large, "experts") > stage_limit(tiny_case(timeout=2.0), "experts")


@pytest.mark.parametrize("text", ["dispatch", "dispatch=", "dispatch=0", "lunch=3", "experts=nan", "experts=1e9", "=3"])
def test_bad_overrides_are_named(text: str) -> None:
    with pytest.raises(InvalidCase, match="allowed is stage=seconds"):
        parse_stage_timeouts(text)
    with pytest.raises(InvalidCase, match="allowed is stage=seconds"):
        tiny_case(stage_timeouts=text)
