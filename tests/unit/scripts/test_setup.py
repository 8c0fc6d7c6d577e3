"""Decisions of scripts/setup in a dry run, with fake interpreters that claim to have a torch."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SETUP = Path(__file__).parents[3] / "scripts" / "setup"


def dry_run(tmp_path: Path, python: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.environ["PATH"], "VENV": str(tmp_path / "venv"), "PYTHON": python, **variables}
    command = [str(SETUP), "--dry-run", *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def interpreter(path: Path, torch: str | None) -> str:
    """Write an interpreter that imports the source `torch` as torch; None: it has no torch."""
    packages = path.parent / f"packages-{path.name}"
    packages.mkdir(parents=True)
    if torch is not None:
        (packages / "torch.py").write_text(torch)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\nPYTHONPATH="{packages}" exec "{sys.base_prefix}/bin/python3" "$@"\n')
    path.chmod(0o755)
    return str(path)


def test_setup_uses_the_torch_of_the_given_python(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "python", '__version__ = "2.9.0+rocm6.4"')
    result = dry_run(tmp_path, python)
    assert f"using torch 2.9.0+rocm6.4 of {python} as it is" in result.stdout
    assert "installing torch" not in result.stdout
    assert not (tmp_path / "venv").exists()


def test_setup_prefers_the_torch_of_an_existing_environment(tmp_path: Path) -> None:
    interpreter(tmp_path / "venv" / "bin" / "python", '__version__ = "2.9.0"')
    python = interpreter(tmp_path / "python", '__version__ = "2.10.0"')
    result = dry_run(tmp_path, python)
    assert "torch 2.9.0 is there already" in result.stdout
    assert "making" not in result.stdout
    assert "2.10.0" not in result.stdout


def test_setup_refuses_a_torch_that_does_not_import(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "python", 'raise OSError("libamdhip64.so: not found")')
    result = dry_run(tmp_path, python)
    assert result.returncode != 0
    assert "does not import: OSError('libamdhip64.so: not found')" in result.stderr
    assert "install" not in result.stdout


@pytest.mark.parametrize(
    ("index", "shown"), [("", "the default index"), ("https://one.example", "https://one.example")]
)
def test_setup_installs_torch_if_none_is_present(tmp_path: Path, index: str, shown: str) -> None:
    python = interpreter(tmp_path / "python", None)
    result = dry_run(tmp_path, python, "--dev", TORCH_INDEX=index)
    assert f"from {shown}" in result.stdout
    assert "with the tools for check and test" in result.stdout


def test_setup_installs_a_driver_of_browsers_only_if_asked(tmp_path: Path) -> None:
    python = interpreter(tmp_path / "python", None)
    assert "a driver of browsers" not in dry_run(tmp_path, python, "--dev").stdout
    asked = dry_run(tmp_path, python, "--browser").stdout
    assert "with the tools for check and test and a driver of browsers" in asked


def test_setup_refuses_an_old_python_with_version_bound_and_fix(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$2" in *platform*) echo 3.9.1 ;; *) exit 1 ;; esac\n')
    python.chmod(0o755)
    result = dry_run(tmp_path, str(python))
    assert result.returncode == 2
    assert f"PYTHON={python} is Python 3.9.1, needed is at least 3.10: make setup PYTHON=" in result.stderr


def test_setup_refuses_a_missing_python_and_unknown_arguments(tmp_path: Path) -> None:
    assert "PYTHON=/no/python does not run" in dry_run(tmp_path, "/no/python").stderr
    assert "unknown argument --devel" in dry_run(tmp_path, sys.executable, "--devel").stderr


OFFLINE = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": "/wheels", "TORCH_INDEX": "https://one.example"}


def test_offline_torch_comes_from_the_folder_of_wheels(tmp_path: Path) -> None:
    result = dry_run(tmp_path, interpreter(tmp_path / "python", None), **OFFLINE)
    assert result.returncode == 0
    assert "no package index, wheels come from /wheels" in result.stdout
    assert "installing torch 2.13.0 from /wheels" in result.stdout
    assert "one.example" not in result.stdout


def test_no_index_without_a_folder_of_wheels_is_refused(tmp_path: Path) -> None:
    result = dry_run(tmp_path, interpreter(tmp_path / "python", None), PIP_NO_INDEX="1")
    assert result.returncode == 2
    assert "PIP_NO_INDEX=1 without PIP_FIND_LINKS; name a folder of wheels: PIP_FIND_LINKS=" in result.stderr


@pytest.mark.parametrize("offline", [True, False])
def test_pip_calls_name_an_index_only_if_online(tmp_path: Path, *, offline: bool) -> None:
    """An interpreter that stands for the environment's records each pip call and gets torch by the first."""
    calls, bin_folder = tmp_path / "calls", tmp_path / "venv" / "bin"
    bin_folder.mkdir(parents=True)
    fake = bin_folder / "python"
    record = f'echo "PIP_NO_INDEX=$PIP_NO_INDEX PIP_FIND_LINKS=$PIP_FIND_LINKS $*" >>"{calls}"'
    fake.write_text(f'#!/bin/sh\nif [ "$2" = pip ]; then {record}\nelif [ -e "{calls}" ]; then echo 2.13.0\nfi\n')
    fake.chmod(0o755)
    variables = OFFLINE if offline else {"TORCH_INDEX": OFFLINE["TORCH_INDEX"]}
    python = interpreter(tmp_path / "python", None)
    environment = {"PATH": os.environ["PATH"], "VENV": str(tmp_path / "venv"), "PYTHON": python, **variables}
    subprocess.run([str(SETUP), "--dev"], env=environment, check=True, capture_output=True)
    torch, setuptools, distbench = calls.read_text().splitlines()
    assert torch.endswith("torch==2.13.0 numpy")
    assert ("--index-url https://one.example" in torch) is not offline
    assert "--no-build-isolation --editable .[dev]" in distbench
    begins = "PIP_NO_INDEX=1 PIP_FIND_LINKS=/wheels " if offline else "PIP_NO_INDEX= PIP_FIND_LINKS= "
    assert all(call.startswith(begins) and "http" not in call for call in (setuptools, distbench))
    assert torch.startswith(begins)
    assert (tmp_path / "venv" / "constraints.txt").read_text() == "torch==2.13.0\n"


def test_setup_prints_a_line_every_two_seconds_while_a_step_lasts(tmp_path: Path) -> None:
    python = tmp_path / "python"
    python.write_text(
        f"""#!/bin/sh
case "$*" in
*"-m venv"*) mkdir -p "{tmp_path}/venv/bin"; cp "$0" "{tmp_path}/venv/bin/python"; sleep 2.4 ;;
*"-m pip"*) ;;
*platform*) echo 3.11.1 ;;
-) cat >/dev/null ;;
esac
"""
    )
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "VENV": str(tmp_path / "venv"), "PYTHON": str(python)}
    done = subprocess.run([str(SETUP)], env=environment, capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    first = lines.index(f"setup: step 1: making {tmp_path}/venv")
    assert lines[first + 1 : first + 3] == [
        "setup: step 1, for 2 s",
        "setup: step 2: installing torch 2.13.0 from the default index, the longest step",
    ]
    assert lines[-1] == "setup: done"
