"""Rows moved by Triton's kernels, interpreted on the CPU, equal the rows that torch's operations move."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

ROOT = Path(__file__).parents[4]


def test_interpreted_triton_rows_equal_torch_bit_for_bit() -> None:
    script = Path(__file__).with_name("interpreted_rows.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, bool] = json.loads(run.stdout)
    assert [name for name, same in found.items() if not same] == []
    assert len(found) == 109
