"""Examples of the docs, as they are written; that of pytest is in tests/unit/testing."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import msgspec

from distbench.distributed.session import Session
from tests.ranks import on_ranks

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "docs/examples"


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    arguments = [sys.executable, *command]
    return subprocess.run(arguments, capture_output=True, text=True, cwd=folder, env=environ, check=False)


def test_own_experts_in_a_script_pass(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "own_experts.py", tmp_path)
    done = run(tmp_path, "own_experts.py")
    assert done.stdout.startswith("PASS (experts own_experts:OwnExperts; emulated: collective for mori)"), done
    assert done.returncode == 0


def verdict_in_group(_: Session, path: Path) -> str:
    """Verdict of the example for torchrun, on a rank of a group that exists."""
    spec = spec_from_file_location("in_torchrun", path)
    assert spec is not None
    assert spec.loader is not None
    example: Any = module_from_spec(spec)
    spec.loader.exec_module(example)
    return str(example.main().verdict.value)


def test_functions_inside_a_torchrun_job_pass() -> None:
    assert on_ranks(2, verdict_in_group, EXAMPLES / "in_torchrun.py") == ["PASS", "PASS"]


def test_installed_plugin_conforms(tmp_path: Path) -> None:
    shutil.copy(EXAMPLES / "acme/acme_distbench.py", tmp_path)
    project = msgspec.toml.decode((EXAMPLES / "acme/pyproject.toml").read_text())["project"]
    info = tmp_path / f"acme_distbench-{project['version']}.dist-info"  # what pip would write
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    ((group, names),) = project["entry-points"].items()
    (info / "entry_points.txt").write_text("\n".join([f"[{group}]", *(f"{key} = {one}" for key, one in names.items())]))
    listed = run(tmp_path, "-m", "distbench", "plugins").stdout
    assert re.search(r"transport +acme +acme-distbench 0.1 +acme_distbench:PLUGIN", listed), listed
    options = ("-n", "2", "--transport", "acme", "--transport-option", "chunk=64", "--device", "cpu")
    done = run(tmp_path, "-m", "distbench", "conform", *options)
    assert done.returncode == 0, done
    assert "collective for mori" not in done.stdout
    assert re.search(r"17 rules: 16 yes, 1 not stated; exit 0", done.stdout), done.stdout
