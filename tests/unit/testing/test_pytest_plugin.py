"""The pytest plugin, in runs of pytest of their own over tests of a stranger's repository."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
KEYS = "ranks=2, model='tiny', tokens=3, device='cpu', numerics='exact', max_dispatch_tokens_per_rank=64"
COUNTED = """
import subprocess
from distbench import api

run = subprocess.run
def counted(command, *others, **given):
    if list(command[1:3]) == ["-m", "distbench"]:
        with open("launches", "a") as file:
            print(command[3], file=file)
    return run(command, *others, **given)
api.subprocess.run = counted
"""
OWN = f"""
import pytest
@pytest.mark.distbench({KEYS})
def test_right(distbench):
    assert distbench.verdict == "PASS"

@pytest.mark.distbench({KEYS}, limit=1, policy="unchecked", expect="UNDER_LIMIT")
def test_lossy(distbench):
    assert distbench.diagnosis[0].cause == "lost by the cut"

@pytest.mark.distbench(suite="cases.toml", ranks=2, tokens=4)
def test_suite(distbench):
    assert distbench.case["tokens"] == [4, 4]

@pytest.mark.distbench({KEYS}, topk=99)
def test_senseless():
    ...

@pytest.mark.distbench(ranks=2, model="tiny", transport="mori", device="cpu")
def test_unsupported():
    ...

def test_plain():
    ...
"""
UNITTEST = """import unittest

class Test(unittest.TestCase):
    @pytest.mark.distbench({})
    def test_x(self): ...
"""
SUITE = """
[defaults]
model = "tiny"
device = "cpu"
numerics = "exact"
max_dispatch_tokens_per_rank = 64
[axes]
limit = ["off", "max-recv"]
[[include]]
limit = 1
policy = "unchecked"
name = "lossy"
"""


def stranger(folder: Path, *options: str, tests: str = OWN) -> subprocess.CompletedProcess[str]:
    """Run pytest over a folder with `tests`, with the plugin as a package would bring it."""
    (folder / "test_own.py").write_text(tests)
    (folder / "cases.toml").write_text(SUITE)
    (folder / "conftest.py").write_text(COUNTED)
    (folder / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers -p distbench.testing.pytest_plugin\n")
    command = [sys.executable, "-m", "pytest", "-q", "-rA", "-p", "no:cacheprovider", *options]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environ, check=False)


def test_marked_tests_run_in_a_launch_for_each_plugin_and_fail_with_verdict_and_diagnosis(tmp_path: Path) -> None:
    shutil.copy(ROOT / "docs/examples/own_combine/test_combine.py", tmp_path)
    done = stranger(tmp_path, "-p", "xdist", "-n2", "--junitxml=junit.xml")
    told = done.stdout
    endings = {name: ending for ending, name in re.findall(r"^(PASSED|FAILED) test_\w+\.py::(\S+)", told, re.MULTILINE)}
    assert endings == {
        "test_right": "PASSED",
        "test_own_combine_returns_the_right_bits": "FAILED",
        "test_lossy": "PASSED",
        "test_suite[limit=off]": "PASSED",
        "test_suite[limit=max-recv]": "PASSED",
        "test_suite[lossy]": "PASSED",
        "test_senseless": "FAILED",
        "test_plain": "PASSED",
    }, told
    assert (
        "BASELINE_WRONG (transport test_combine:OwnCombine; emulated: reference for aiter): rank 0, padded, comb"
        in told
    )
    assert "\ndiagnosis: combine: a rank's share is missing (certain): rank 0" in told
    assert "INVALID: topk = 99: above num_experts" in told
    assert "SKIPPED [1]" in told
    assert "transport mori: no package mori here" in told
    assert (tmp_path / "launches").read_text() == "suite\nsuite\n"
    junit = (tmp_path / "junit.xml").read_text()
    assert '<property name="distbench_verdict" value="UNDER_LIMIT"' in junit


@pytest.mark.parametrize(
    ("test", "told"),
    [
        ("@pytest.mark.distbench(2)\ndef test_x(): ...", "takes keywords only, such as ranks=2"),
        ("@pytest.mark.distbench(tokns=2)\ndef test_x(): ...", r"unknown key 'tokns' \(did you mean tokens\?\)"),
        ("@pytest.mark.distbench(suite='no.toml')\ndef test_x(): ...", "distbench: suite .*cannot be read"),
        ("@pytest.mark.distbench(suite='cases.toml', topk=99)\ndef test_x(): ...", "topk = 99"),
        ("@pytest.mark.distbench(ranks=0)\ndef test_x(): ...", "ranks = 0; allowed are whole numbers from 1"),
        ("@pytest.mark.distbench(expect='OK')\ndef test_x(): ...", "expect = 'OK'; allowed is"),
        (
            "pytestmark = pytest.mark.distbench(suite='no.toml')\n@pytest.mark.distbench(ranks=2)\ndef test_x(): ...",
            "no.toml",
        ),
        (UNITTEST.format("model='tiny', topk=99"), "INVALID: topk = 99"),
        (UNITTEST.format("suite='cases.toml'"), "its cases are items of a function"),
        ("def test_x(distbench): ...", r"mark the test with pytest.mark.distbench\(…\)"),
    ],
)
def test_wrong_marker_is_named_without_a_launch(test: str, told: str, tmp_path: Path) -> None:
    done = stranger(tmp_path, tests=f"import pytest\n\n{test}\n")
    assert done.returncode in (1, 2)
    assert re.search(told, done.stdout), done.stdout
    assert not (tmp_path / "launches").exists()


def test_plugin_that_no_test_uses_loads_nothing_of_the_bench(tmp_path: Path) -> None:
    tests = (
        "import sys\n\ndef test_x():\n    loaded = {name for name in sys.modules if name.startswith('distbench')}\n"
        "    assert loaded == {'distbench', 'distbench.testing', 'distbench.testing.pytest_plugin'}\n"
        "    assert not {'torch', 'rich', 'msgspec', 'filelock'} & sys.modules.keys()\n"
    )
    (tmp_path / "test_x.py").write_text(tests)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "distbench.testing.pytest_plugin", "-p", "no:cacheprovider"]
    environ = os.environ | {"PYTHONPATH": str(ROOT), "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environ, check=False)
    assert "1 passed" in done.stdout, done.stdout
