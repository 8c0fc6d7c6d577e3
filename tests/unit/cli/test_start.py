"""Start of every command: its help and its lists load few modules, so that it answers at once."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from distbench.cli.main import COMMANDS
from tests.end_to_end.launches import ROOT

NAMES = [name for group in COMMANDS.values() for name in group]
MOST, MOST_OF_A_TABLE = 195, 260
"""Modules, Python's own included: 0.08 s and 0.15 s of processor time, where 0.3 s are allowed."""
HEAVY = {"asyncio", "filelock", "importlib.metadata", "jinja2", "multiprocessing", "numpy", "torch"}

# Each command runs in a fork of one process that has loaded the command line alone.
_SCRIPT = """
import json, os, sys
from distbench.cli.main import main
read, write = os.pipe()
for arguments in json.loads(sys.argv[1]):
    if not os.fork():
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        try:
            main(arguments)
        except SystemExit:
            pass
        os.write(write, json.dumps([arguments, sorted(sys.modules)]).encode() + b"\\n")
        os._exit(0)
    os.wait()
    os.write(1, os.read(read, 1 << 16))
"""


def loaded(*commands: list[str]) -> dict[str, set[str]]:
    """Modules that each command has loaded when it has answered."""
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, json.dumps(commands)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return {" ".join(arguments): set(modules) for arguments, modules in map(json.loads, done.stdout.splitlines())}


def test_help_and_lists_load_few_modules() -> None:
    helps, lists = [[name, "--help"] for name in NAMES], [[name] for name in COMMANDS["List"]]
    found = loaded(["--help"], *helps, *lists)
    assert len(found) == 1 + len(helps) + len(lists)
    counts = {name: len(modules) for name, modules in found.items()}
    most = {name: MOST if "--help" in name else MOST_OF_A_TABLE for name in found}
    assert {name: count for name, count in counts.items() if count > most[name]} == {}
    heavy = {name: modules & HEAVY for name, modules in found.items() if modules & HEAVY}
    assert heavy == {"plugins": {"importlib.metadata"}}  # it lists what is installed


@pytest.mark.parametrize("module", ["numpy", "filelock"])
def test_module_that_a_command_loads_is_seen(module: str) -> None:
    script = _SCRIPT.replace("main(arguments)", f"import {module}")
    done = subprocess.run(
        [sys.executable, "-c", script, '[["--help"]]'], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert module in json.loads(done.stdout)[1]


_ABORTED = """
import atexit, os, sys
from distbench.__main__ import main
atexit.register(os.abort)
sys.argv = ["distbench", *sys.argv[1:]]
main()
"""


@pytest.mark.parametrize(("command", "exit_code"), [("presets", 0), ("nothing", 2)])
def test_rank_of_torchrun_exits_with_its_code_whatever_the_interpreters_clean_up_does(
    command: str, exit_code: int
) -> None:
    environ = os.environ | {"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2", "RANK": "0"}
    asked = [sys.executable, "-c", _ABORTED, command]
    done = subprocess.run(asked, capture_output=True, text=True, cwd=ROOT, env=environ, check=False)
    assert done.returncode == exit_code
    assert "tiny" in done.stdout or exit_code == 2
    assert done.stderr.count("\n") == (1 if exit_code else 0)
