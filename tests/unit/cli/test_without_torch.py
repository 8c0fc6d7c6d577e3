"""Without torch: one clear error, and commands that do not need torch work."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distbench.report.files import write_report
from tests.cases import tiny_case
from tests.reports import report_of

ROOT = Path(__file__).parents[3]
BLOCKED = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" or name.startswith("torch."):
            raise ModuleNotFoundError("No module named 'torch'", name="torch")

sys.meta_path.insert(0, Blocked())
"""
BROKEN = "raise ImportError('libc10.so: cannot open shared object file')\n"


def distbench(site: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": f"{site}:{ROOT}"}
    command = [sys.executable, "-m", "distbench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environ, timeout=500)


@pytest.mark.parametrize(
    "command",
    [
        ("run", "--nproc=2", "--model=tiny"),
        ("suite", "smoke", "--nproc=2"),
        ("sweep", "--nproc=2", "--model=tiny", "--limits=sum"),
        ("selftest", "--quick", "--nproc=2"),
        ("bisect", "report.json"),
        ("shrink", "report.json"),
        ("tune",),
    ],
)
def test_command_that_needs_torch_is_refused_in_one_line_without_it(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    report = tmp_path / "report.json"
    write_report(report, report_of(tiny_case(2), "experts: other values"))
    arguments = [str(report) if word == "report.json" else word for word in command]
    out = [] if command[0] == "tune" else [f"--out={tmp_path}/out"]
    done = distbench(tmp_path, *arguments, *out)
    assert done.returncode == 77
    last = done.stderr.splitlines()[-1]
    assert last.startswith("distbench: UNSUPPORTED: torch: No module named 'torch', for ")
    assert "Traceback" not in done.stderr


def test_broken_torch_leaves_no_traceback_of_a_thread(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(BROKEN)
    done = distbench(tmp_path, "run", "--nproc=2", "--model=tiny", f"--out={tmp_path}/out")
    assert done.returncode == 3
    assert "LAUNCH_FAILED: ImportError: libc10.so: cannot open shared object file; distbench doctor" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "command", [("presets",), ("kernels",), ("advise", "-q"), ("show", "report.json"), ("report", ".", "--report=md")]
)
def test_command_without_ranks_runs_without_torch(tmp_path: Path, command: tuple[str, ...]) -> None:
    (tmp_path / "sitecustomize.py").write_text(BLOCKED)
    write_report(tmp_path / "report.json", report_of(tiny_case(2), ""))
    arguments = [str(tmp_path / word) if word in ("report.json", ".") else word for word in command]
    (tmp_path / "results.jsonl").write_bytes(b"")
    done = distbench(tmp_path, *arguments)
    assert (done.returncode, done.stderr) == (0, "")
