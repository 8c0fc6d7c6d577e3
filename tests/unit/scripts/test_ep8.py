"""The stages of scripts/ep8.sh, by a short trial on the CPU, and the table of their results."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "scripts"


def run_ep8(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = ["bash", str(SCRIPTS / "ep8.sh"), *arguments]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable, "HOME": "/nonexistent"}
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False)


def test_list_names_every_stage_and_only_selects_by_name_or_beginning() -> None:
    lines = run_ep8("--list").stdout.splitlines()
    names = [line.split()[0] for line in lines]
    assert len(names) == len(set(names))
    assert {"cases-collective", "cases-symmetric", "cases-deepep", "selftest", "mutants", "start-8"} <= set(names)
    some = run_ep8("--list", "--only", "cases,mutants", "--nproc", "4").stdout
    assert [line.split()[0] for line in some.splitlines()] == [
        "cases-collective", "cases-symmetric", "cases-deepep", "mutants",
    ]  # fmt: skip
    assert "start-8" not in run_ep8("--list", "--nproc", "4").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--fast",), "--fast: no such option"),
        (("--nproc", "0"), "--nproc 0: allowed are integers from 1 to 999"),
        (("--device", "tpu"), "--device tpu: allowed are cuda and cpu"),
        (("--only",), "--only needs a value"),
        (("--device", "cpu", "--only", "cases-none"), "--only cases-none: no such stage; see --list"),
    ],
)
def test_wrong_options_are_refused_with_what_is_allowed(
    arguments: tuple[str, ...], message: str, tmp_path: Path
) -> None:
    done = run_ep8(*arguments, *(("--out", str(tmp_path)) if "none" in message else ()))
    assert done.returncode == 2
    assert message in done.stderr


def test_results_of_another_number_of_ranks_are_not_taken_for_these(tmp_path: Path) -> None:
    (tmp_path / "asked").write_text("--device cpu --nproc 4\n")
    done = run_ep8("--device", "cpu", "--nproc", "2", "--only", "graph-bf16", "--out", str(tmp_path))
    assert done.returncode == 2
    assert "has results of --device cpu --nproc 4, not of --device cpu --nproc 2; name another folder" in done.stderr
    assert not (tmp_path / "graph-bf16").exists()


def test_trial_on_the_cpu_passes_skips_with_the_reason_and_runs_nothing_twice(tmp_path: Path) -> None:
    trial = ("--device", "cpu", "--nproc", "2", "--only", "cases-collective,graph-bf16", "--out", str(tmp_path))
    first = run_ep8(*trial)
    assert first.returncode == 0, first.stdout + first.stderr
    assert (tmp_path / "cases-collective" / "results.html").exists()
    table = (tmp_path / "table.md").read_text()
    assert table.startswith("A trial on the CPU with tiny shapes: no time means anything")
    assert "| 2 PASS; 2 of 2 as expected |" in table
    assert re.search(r"\| graph-bf16 \| skipped \| \d+ \| skipped: needs GPUs \|", table), table
    assert "cases-collective: passed before" in run_ep8(*trial).stdout


def test_stage_that_exceeds_its_limit_is_stopped_and_runs_again(tmp_path: Path) -> None:
    trial = ("--device", "cpu", "--nproc", "2", "--only", "jitter-1", "--limit", "1", "--out", str(tmp_path))
    stopped = run_ep8(*trial)
    assert stopped.returncode == 75
    assert "jitter-1: stopped" in stopped.stdout
    assert "passed before" not in run_ep8(*trial).stdout


def test_table_counts_bounds_and_quotes_figures(tmp_path: Path) -> None:
    for name, state, log in (
        ("bytes-2-collective", "failed 3 1 collective", "ratio 1.2, at most 1.5: ok\nratio 1.6, at most 1.5: MISSED\n"),
        ("start-2", "broken 1 3 a | b", "no ranks"),
    ):
        (tmp_path / name).mkdir()
        (tmp_path / name / "state").write_text(state)
        (tmp_path / name / "log").write_text(log)
    command = [sys.executable, str(SCRIPTS / "ep8_table.py"), str(tmp_path)]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "| bytes-2-collective | failed | 3 | 1 of 2 bounds held |" in table
    assert "| start-2 | broken | 1 | no ranks |" in table
    assert "ratio 1.6, at most 1.5: MISSED" in table.split("## bytes-2-collective")[1]
