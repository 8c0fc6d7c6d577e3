"""The examples for GitLab, GitHub and Jenkins: their commands, their shell, and the files that they keep."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from distbench.case.suite import load_suite
from distbench.cli.main import _parser
from distbench.errors import InvalidCase
from distbench.report.export import parse_targets
from tests.hosts import ROOT

FOLDER = ROOT / "launch" / "ci"
GITLAB = yaml.safe_load((FOLDER / "gitlab-ci.yml").read_text())["distbench"]
GITHUB = yaml.safe_load((FOLDER / "github-workflow.yml").read_text())
STEPS = {step["name"]: step for step in GITHUB["jobs"]["nightly"]["steps"]}
JENKINS = (FOLDER / "Jenkinsfile").read_text()
_QUOTED = re.compile(r"'''(.*?)'''|'([^'\n]*)'", re.DOTALL)
_REDIRECTED = re.compile(r"\s*(?:>>|\|\|).*$")


def shell_lines() -> dict[str, list[str]]:
    """Lines of shell of each example."""
    github = "\n".join(step.get("run", "") for step in STEPS.values())
    jenkins = "\n".join(long or short for long, short in _QUOTED.findall(JENKINS))
    texts = {"gitlab": "\n".join(GITLAB["script"]), "github": github, "jenkins": jenkins}
    return {name: re.sub(r"\\\n\s*", "", text).splitlines() for name, text in texts.items()}


def commands(lines: list[str]) -> list[Any]:
    """Options of the commands of distbench in lines of shell."""
    ours = [line.strip() for line in lines if line.strip().startswith("distbench ")]
    return [_parser().parse_args(shlex.split(_REDIRECTED.sub("", one))[1:]) for one in ours]


@pytest.mark.parametrize("name", ["gitlab", "github", "jenkins"])
def test_commands_of_an_example_are_understood_and_run_a_suite_every_night(name: str) -> None:
    every = commands(shell_lines()[name])
    (suite,) = (one for one in every if hasattr(one, "suite"))
    assert load_suite(suite.suite, suite.nproc).entries
    assert suite.time_budget == 3 * 3600
    (trend,) = (one for one in every if hasattr(one, "folders"))
    assert suite.out.startswith(("$night", *(f"{folder}/" for folder in trend.folders)))
    written = [target for one in every for text in one.report for target in parse_targets(text, FOLDER)]
    assert {"junit", "html", "csv"} <= set(written)


@pytest.mark.parametrize("line", ["distbench suite smoke --nprocs 8", "distbench trends nights"])
def test_command_that_no_parser_understands_is_noticed(line: str) -> None:
    with pytest.raises(InvalidCase):
        commands([line])


def test_files_that_an_example_keeps_are_those_that_its_commands_write() -> None:
    texts = {name: "\n".join(lines) for name, lines in shell_lines().items()}
    gitlab = [*GITLAB["artifacts"]["paths"], GITLAB["artifacts"]["reports"]["junit"]]
    github = STEPS["Upload"]["with"]["path"].split()
    jenkins = re.findall(r"(?:testResults|artifacts): '([^']*)'", JENKINS)
    kept = {"gitlab": gitlab, "github": github, "jenkins": ", ".join(jenkins).split(", ")}
    for name, files in kept.items():
        assert len(files) >= 4
        for file in files:
            assert re.search(rf"(?:=|[\s/]){re.escape(file.replace('/**', ''))}\b", texts[name])


def test_codes_for_lack_of_time_and_of_parts_fail_no_pipeline() -> None:
    assert GITLAB["allow_failure"] == {"exit_codes": [75, 77]}
    assert "code == 75 || code == 77" in JENKINS
    assert STEPS["Reports"]["if"] == STEPS["Upload"]["if"] == "always()"
    assert GITLAB["artifacts"]["when"] == GITLAB["cache"]["when"] == "always"


def test_jenkinsfile_closes_what_it_opens() -> None:
    bare = re.sub(r"'''.*?'''|'[^'\n]*'|\"[^\"\n]*\"|//[^\n]*", "", JENKINS, flags=re.DOTALL)
    for pair in ("{}", "()"):
        assert bare.count(pair[0]) == bare.count(pair[1]) > 0


STUB = """#!/bin/sh
echo "$@" >>calls
case $1 in suite) shift; while [ "$1" != --out ]; do shift; done; mkdir "$2"; exit "$CODE" ;; esac
"""


@pytest.mark.parametrize(("code", "older"), [(0, 0), (1, 70), (75, 1)])
@pytest.mark.parametrize("name", ["gitlab", "github"])
def test_shell_of_an_example_keeps_sixty_nights_and_ends_with_the_code_of_the_suite(
    tmp_path: Path, name: str, code: int, older: int
) -> None:
    stub = tmp_path / "bin" / "distbench"
    stub.parent.mkdir()
    stub.write_text(STUB)
    stub.chmod(0o755)
    for number in range(older):
        (tmp_path / "nights" / f"2026-09-{number:03d}").mkdir(parents=True)
    script = "\n".join(GITLAB["script"]) if name == "gitlab" else STEPS["Suite"]["run"]
    variables = {
        "PATH": f"{stub.parent}:{os.environ['PATH']}",
        "CODE": str(code),
        "CI_JOB_ID": "7",
        "GITHUB_RUN_ID": "7",
        "GITHUB_ENV": str(tmp_path / "env"),
    }
    command = ["bash", "-eo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0 if name == "github" and code == 75 else code, "")
    assert ("::warning::" in done.stdout) == (name == "github" and code == 75)
    nights = sorted(path.name for path in (tmp_path / "nights").iterdir())
    assert len(nights) == min(older + 1, 60)
    assert nights[-1].endswith("-7")
    assert older < 60 or nights[0] == "2026-09-011"
    if name == "gitlab":
        assert (tmp_path / "calls").read_text().splitlines()[-1].startswith("trend nights ")
    else:
        assert (tmp_path / "env").read_text() == f"night=nights/{nights[-1]}\n"
