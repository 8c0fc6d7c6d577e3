"""Help texts, lists and suggestions of every command."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from distbench.case.groups import COMMON, GROUPS, UNITS
from distbench.case.resolve import load_case_file, resolve_case
from distbench.case.spec import DERIVED_KEYS, FIELD_HINTS
from distbench.case.suite import load_suite
from distbench.cli.argument_types import plain_counts
from distbench.cli.main import COMMANDS, main
from distbench.faults.catalogue import listed_faults
from distbench.faults.injector import FAULTS

NAMES = [name for group in COMMANDS.values() for name in group]


def help_of(capsys: pytest.CaptureFixture[str], *arguments: str, word: str = "") -> str:
    with pytest.raises(SystemExit) as ended:
        main([*arguments, f"--help={word}" if word else "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert main(arguments) == 2
    return capsys.readouterr().err


@pytest.fixture(autouse=True)
def _narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


def test_help_names_every_command_and_every_module_of_a_command_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert re.findall(r"^  ([a-z]+) ", help_of(capsys), re.MULTILINE) == NAMES
    folder = Path(__file__).parents[3] / "distbench/cli"
    made = {path.stem for path in folder.glob("*.py") if "\ndef add(commands" in path.read_text(encoding="utf-8")}
    assert made == set(NAMES)


@pytest.mark.parametrize("command", NAMES)
def test_help_of_a_command_fits_80_columns_and_50_lines_and_names_every_flag(
    capsys: pytest.CaptureFixture[str], command: str
) -> None:
    short, full = help_of(capsys, command), help_of(capsys, command, word="all")
    assert short.startswith(f"usage: distbench {command}")
    assert short.count("\n") <= 50
    assert max(map(len, (short + full).splitlines())) <= 80
    flags = set(re.findall(r"^  (?:-\w, )?(--[\w-]+)", full, re.MULTILINE))
    assert flags
    assert flags <= set(re.findall(r"--[\w-]+", short))
    assert not re.findall(r"^  .*--[\w-]+.* {2,}\(default: .*\)$", full, re.MULTILINE), "a default alone is no help"


def test_help_of_a_word_shows_a_group_or_the_options_that_have_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert "--pol" not in help_of(capsys, "run", word="timing")
    assert "--flush-l2" in help_of(capsys, "run", word="timing")
    assert "--combine-quant" in help_of(capsys, "run", word="fp8")
    assert "(did you mean timing?); groups are all, " in refusal(capsys, "run", "--help=timng")


def test_every_key_that_is_a_flag_is_in_one_group() -> None:
    keys = [key for group in GROUPS.values() for key in group.units]
    assert sorted(keys) == sorted(key for key in FIELD_HINTS if key not in (*DERIVED_KEYS, "ep_size"))
    assert COMMON.keys() <= UNITS.keys()


@pytest.mark.parametrize(
    ("arguments", "near"),
    [
        (["rum"], "run"),
        (["run", "--limt=3"], "--limit"),
        (["run", "--model=qwen3-30b-a3"], "qwen3-30b-a3b"),
        (["suite", "smoek"], "smoke"),
        (["faults", "hnag"], "hang"),
        (["run", "--model=tiny", "--inject=flipped-bits"], "flipped-bit"),
    ],
)
def test_misspelt_name_is_refused_with_the_closest_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], near: str
) -> None:
    monkeypatch.chdir(tmp_path)
    assert f"(did you mean {near}?)" in refusal(capsys, *arguments)
    assert "did you mean" not in refusal(capsys, arguments[0] if len(arguments) > 1 else "run", "--xyzzyxyzzy")


def test_misspelt_key_of_a_case_file_is_refused_with_the_closest_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "case.toml").write_text("routng = 1\n")
    assert "unknown key 'routng' (did you mean routing?); allowed" in refusal(
        capsys, "run", f"--case={tmp_path}/case.toml"
    )


def test_listed_faults_are_those_that_a_case_can_inject() -> None:
    assert [(one.name, one.stage, one.text, one.bug) for one in listed_faults()] == [
        (name, str(kind.stage), kind.__doc__, kind.bug) for name, kind in FAULTS.items()
    ]


def test_lists_name_every_suite_and_fault_and_the_options_of_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert (main(["suites"]), main(["faults"]), main(["faults", "hang"])) == (0, 0, 0)
    told = capsys.readouterr().out
    assert all(name in told for name in ("smoke", "uneven", *FAULTS))
    assert "dispatch, experts, combine" in told


def test_init_writes_a_case_and_a_suite_that_are_valid_and_replaces_no_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    case, suite = tmp_path / "case.toml", tmp_path / "suite.toml"
    assert main(["init", str(case), "--model=kimi-k2"]) == 0
    assert main(["init", str(suite), "--suite"]) == 0
    capsys.readouterr()
    assert resolve_case([load_case_file(str(case))], 8).case.model == "kimi-k2"
    case.write_text(re.sub(r"^# (\w+ = )", r"\1", case.read_text(), flags=re.MULTILINE))
    every = load_case_file(str(case))
    assert every.values.keys() == set(UNITS) - {"caller", "caller_wheel", "caller_folder"}
    assert resolve_case([every], 8).case.model == "kimi-k2"
    assert len(load_suite(str(suite), 4).entries) == 7
    assert "cannot be written (File exists)" in refusal(capsys, "init", str(suite))
    assert "name it case.toml" in refusal(capsys, "init", "case.json")


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("4k", "4096"),
        ("1,2K,1m,...", "1,2048,1048576,..."),
        ("max-recv+1k", "max-recv+1024"),
        ("sum32", "sum32"),
        ("1.5k", "1.5k"),
        ("4kb", "4kb"),
    ],
)
def test_suffix_of_a_number_of_tokens_or_rows_is_a_power_of_1024(text: str, plain: str) -> None:
    assert plain_counts(text) == plain
