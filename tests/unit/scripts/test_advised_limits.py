"""A few of the cases that the script runs by the thousand: limits that advise proves, and those it saw exceeded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[3] / "scripts/advised_limits.py"


def test_proven_limits_lose_no_row_and_recorded_steps_exceed_a_limit_where_advise_says() -> None:
    command = [sys.executable, str(SCRIPT), "--cases=4", "--recordings=1", "--nproc=3"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done
    assert "proven: 4 cases, {'PASS': " in done.stdout
    assert "a row less: 1" in done.stdout
    assert "seen: 1 recordings, 16 steps and layers" in done.stdout
    assert "0 steps above" not in done.stdout
