"""A newcomer's first hour: the commands of the README, as they stand there, in a fresh clone.

Stand-ins: an environment that is there already for the one that make would install, and one file of tests for all.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.end_to_end.launches import ROOT
from tests.pages import read_page, words

_GIT = {"GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": "safe.directory", "GIT_CONFIG_VALUE_0": "*"}
_OF_MAKE = re.compile(r"PYTEST_|MAKE|(?:VENV|PYTHON|ARGS|NPROC)$")
"""Variables that `make test` and pytest set for the tests, and a newcomer's shell has not."""
_FAST = {
    "make run": "export NPROC=2 ARGS='--model tiny --numerics exact'",
    "make test": "export ARGS=tests/unit/utils/test_streams.py TEST_WORKERS=0",
}
"""Variables that keep the two commands short; the README names NPROC and ARGS."""
_ENVIRONMENT = """
mkdir -p .venv/bin
printf '#!/bin/sh\\nPYTHONPATH="{clone}" exec "{python}" "$@"\\n' >.venv/bin/python
printf '#!/bin/sh\\nexec "{clone}/.venv/bin/python" -m distbench "$@"\\n' >.venv/bin/distbench
chmod +x .venv/bin/*
touch .venv/.ready .venv/.ready-dev
"""


def readme_commands(root: Path) -> list[str]:
    """Commands of the README's first hour, without comments."""
    section = (root / "README.md").read_text(encoding="utf-8").partition("## The first hour\n")[2].partition("\n## ")[0]
    return [re.sub(r"  +# .*", "", line) for line in re.findall(r"^    (\S.*)$", section, re.MULTILINE)]


def script_of(commands: list[str], clone: Path) -> str:
    """The commands one after the other in one shell, whatever their exit codes, which are printed."""
    lines = []
    for command in commands:
        lines += [_FAST.get(command, ""), command, 'echo "exit $?: $BASH_COMMAND"']
        if command.startswith("git clone"):
            lines.append(_ENVIRONMENT.format(clone=clone, python=sys.executable))
    return "\n".join(lines).replace("REPOSITORY", str(ROOT))


@pytest.mark.timeout(600)
def test_first_hour_of_the_readme_ends_with_an_archive_and_a_page(tmp_path: Path) -> None:
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("needs git and a checkout, from which to clone")
    commands = readme_commands(ROOT)
    assert [command.split()[:2] for command in commands] == [
        *(["git", "clone"], ["make", "run"], ["make", "test"], ["export", "PATH=$PWD/.venv/bin:$PATH"]),
        *(["distbench", name] for name in ("init", "run", "report", "bundle")),
    ]
    clone = tmp_path / "distbench"
    variables = {name: value for name, value in os.environ.items() if not _OF_MAKE.match(name)}
    done = subprocess.run(
        ["bash", "-c", script_of(commands, clone)],  # noqa: S607 - the newcomer's own
        cwd=tmp_path,
        env=variables | _GIT,
        capture_output=True,
        text=True,
        check=False,
    )
    told = f"{done.stdout}\n{done.stderr}"
    codes = [int(code) for code in re.findall(r"^exit (\d+): ", done.stdout, re.MULTILINE)]
    assert codes == [0, 0, 0, 0, 0, 1, 1, 0], told
    assert "PASS (emulated: collective for mori, reference for aiter)" in done.stdout
    assert re.search(r"^\d+ passed in ", done.stdout, re.MULTILINE), told
    assert "tokens = 16" in (clone / "case.toml").read_text()
    assert "UNDER_LIMIT" in words(read_page(clone / "distbench-out" / "run" / "results.html"))
    (archive,) = clone.glob("distbench-*.zip")
    with zipfile.ZipFile(archive) as sent:
        names = {Path(name).name for name in sent.namelist()}
        (summary,) = (sent.read(name).decode() for name in sent.namelist() if name.endswith("summary.txt"))
    assert {"report.json", "case.json", "manifest.json", "rank-00000.safetensors", "rank-00001.safetensors"} <= names
    assert summary in done.stdout
    assert "UNDER_LIMIT (emulated" in summary
