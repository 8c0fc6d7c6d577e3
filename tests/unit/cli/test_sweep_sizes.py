"""Sizes of a sweep: which cases it runs, and what it refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from distbench.case.entry import Entry
from distbench.cli import sweep
from distbench.cli.main import main
from distbench.cli.parser import Parser
from distbench.cli.sweep import sweep_entries


def entries(*arguments: str) -> tuple[Entry, ...]:
    parser = Parser(prog="distbench")
    sweep.add(parser.add_subparsers(prog="distbench"))
    return sweep_entries(parser.parse_args(["sweep", "--model=tiny", "--nproc=2", *arguments]))


def names(*arguments: str) -> list[str]:
    return [entry.name for entry in entries(*arguments)]


@pytest.mark.parametrize("flag", ["--tokens=1:4:*2", "--sizes=1,2,4", "--sizes=1:4"])
def test_sizes_run_without_a_limit_and_at_the_limit_of_the_case(flag: str) -> None:
    found = entries(flag)
    assert [entry.name for entry in found] == [
        f"tokens={size}/limit={limit}" for size in (1, 2, 4) for limit in ("off", "sum32")
    ]
    assert [entry.case.tokens for entry in found[::2]] == [(1, 1), (2, 2), (4, 4)]


def test_sizes_take_the_limits_that_are_asked_for() -> None:
    assert names("--sizes=64,128", "--limits=sum,max-recv-1") == [
        f"tokens={size}/limit={limit}" for size in (64, 128) for limit in ("off", "sum", "max-recv-1")
    ]
    assert names("--sizes=64", "--limit=pow2") == ["tokens=64/limit=off", "tokens=64/limit=pow2"]
    assert "tokens=4096/limit=2048" in names("--sizes=4k", "--limits=2k")


def test_sizes_replace_the_tokens_of_a_case_file(tmp_path: Path) -> None:
    path = tmp_path / "case.toml"
    path.write_text('tokens = [3, 5]\nlimit = "sum"\n')
    assert {entry.case.tokens for entry in entries(f"--case={path}", "--sizes=7")} == {(7, 7)}
    assert {entry.case.tokens for entry in entries(f"--case={path}", "--limits=sum")} == {(3, 5)}


def test_tokens_without_a_range_are_those_of_each_rank() -> None:
    found = entries("--tokens=3,5", "--limits=sum")
    assert [entry.name for entry in found] == ["limit=off", "limit=sum"]
    assert {entry.case.tokens for entry in found} == {(3, 5)}


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["--sizes=1:4", "--tokens=3"], "both say what the ranks have; give one"),
        (["--tokens=4:1"], "does not get from its start to its end"),
        (["--tokens=1:2,x"], "neither a number nor a range"),
        (["--sizes=1:8k"], "size 8192: a sender may hold 4096 tokens; give --max-dispatch-tokens-per-rank 8192"),
    ],
)
def test_sizes_that_make_no_sweep_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], why: str
) -> None:
    assert main(["sweep", "--model=tiny", "--nproc=2", f"--out={tmp_path}", *arguments]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "results.jsonl").exists()
