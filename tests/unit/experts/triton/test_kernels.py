"""The Triton kernels on the CPU, through Triton's interpreter, against the integer oracle."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

SCRIPT = Path(__file__).with_name("interpreted.py")
ROOT = Path(__file__).parents[4]
FOUND = (
    *(f"{name} {dtype}" for name in ("swapped", "atomic", "split") for dtype in ("float16", "float32")),
    *(f"{live} live" for live in (0, 1, 17)),
    *(f"mutation: {what}" for what in ("mask", "experts", "one weight", "live rows")),
    "ids of no rank",
    "bits at any place",
    "sort",
    "copies by place",
)


@pytest.fixture(scope="module")
def found() -> dict[str, bool]:
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, str(SCRIPT)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    answer: dict[str, bool] = json.loads(run.stdout)
    return answer


def test_every_interpreted_check_has_a_test(found: dict[str, bool]) -> None:
    assert set(found) == set(FOUND)


@pytest.mark.parametrize("name", FOUND)
def test_interpreted_triton_check_holds(found: dict[str, bool], name: str) -> None:
    assert found[name] is True
