"""What scripts/bench_check.py says of a bound: nothing on the CPU, where there is none."""

from __future__ import annotations

import math
import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "bench_check.py"


@pytest.mark.parametrize(
    ("bound", "held", "told"),
    [
        (0.31, True, "; bound of a warm case 31%: ok"),
        (0.31, False, "; bound of a warm case 31%: MISSED"),
        (math.inf, True, ""),
    ],
)
def test_a_bound_is_told_where_there_is_one(bound: float, held: bool, told: str) -> None:
    assert runpy.run_path(str(SCRIPT), run_name="bench_check")["_told"]("warm", bound, held=held) == told
