"""The kernels over symmetric memory, interpreted on the CPU by three ranks that map each other's memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="Triton is not installed here")

ROOT = Path(__file__).parents[4]


def test_interpreted_ranks_move_and_add_rows_and_notice_faults() -> None:
    script = Path(__file__).with_name("interpreted_ranks.py")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    found: dict[str, bool] = json.loads(run.stdout)
    assert [name for name, holds in found.items() if not holds] == []
    assert len(found) == 101
