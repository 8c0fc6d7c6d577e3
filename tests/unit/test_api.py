"""The interface in Python: keys of a case, the command that they become, and its endings as reports or errors."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

from distbench import api
from distbench.api import Case
from distbench.errors import InvalidCase
from distbench.report.files import write_report
from distbench.verify.records import Reason
from tests.brought_plugins import OPTIONED, Multiplies
from tests.cases import tiny_case
from tests.reports import report_of


def test_import_loads_neither_torch_nor_rich_nor_argparse_of_the_command_line() -> None:
    code = "import sys, distbench.api; print(sorted({'torch', 'rich', 'distbench.cli'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout == b"[]\n"


def test_all_names_are_documented() -> None:
    page = (Path(__file__).parents[2] / "docs/api.md").read_text(encoding="utf-8")
    assert not [name for name in api.__all__ if f"`{name}" not in page]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tokns": 3}, r"^Case: unknown key 'tokns' \(did you mean tokens\?\)"),
        ({"tokens": -1}, "^Case: tokens = -1"),
        ({"tokens": "3"}, "^Case: tokens = '3'"),
        (
            {"transport": "acme"},
            "^Case: transport = 'acme': allowed are collective, symmetric, mori, deepep, or package.module:factory$",
        ),
        ({"transport": lambda _: None}, "^transport = <function .*: no rank can import it; define it at the top"),
        ({"experts": OPTIONED}, "^experts = Plugin.*: no rank can import it"),
    ],
)
def test_wrong_key_or_value_is_refused_when_the_case_is_made(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidCase, match=message):
        Case(**keys)


def test_factory_is_named_by_its_module_and_options_may_be_a_mapping() -> None:
    case = Case(transport=Multiplies, transport_option={"factor": 2, "b": "x"}, tokens=(1, 2))
    assert case.keys == {
        "transport": "tests.brought_plugins:Multiplies",
        "transport_option": "factor=2;b=x",
        "tokens": [1, 2],
    }
    assert repr(case.but(tokens=3)).endswith("tokens=3)")


def test_factory_of_a_script_is_named_by_the_scripts_file(tmp_path: Path) -> None:
    script = tmp_path / "own_script.py"
    script.write_text("from distbench.api import Case\ndef make(context): ...\nprint(Case(experts=make).keys)\n")
    done = subprocess.run([sys.executable, str(script)], capture_output=True, check=True)
    assert done.stdout == b"{'experts': 'own_script:make'}\n"
    (tmp_path / "parts").mkdir()
    script.rename(tmp_path / "parts/own_script.py")
    of_module = [sys.executable, "-m", "parts.own_script"]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(of_module, capture_output=True, check=True, cwd=tmp_path, env=environ)
    assert done.stdout == b"{'experts': 'parts.own_script:make'}\n"


def test_file_names_no_code_unless_an_argument_does(tmp_path: Path) -> None:
    path = tmp_path / "case.toml"
    path.write_text('model = "tiny"\ntransport = "own:make"\n')
    with pytest.raises(InvalidCase, match="names code to execute; give transport as an argument too"):
        Case.from_file(path)
    assert Case.from_file(path, transport="mine:make").keys == {"model": "tiny", "transport": "mine:make"}


class Commands:
    """Stands for the processes that the interface starts: keeps their arguments, and ends each in `ending`."""

    def __init__(self, ending: str = "", *reports: Any) -> None:
        self.ending, self.reports = ending, reports
        self.given: list[list[str]] = []

    def __call__(self, command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        self.given.append([part for part in command[3:] if not part.startswith("--out=")])
        out = Path(next(part for part in command if part.startswith("--out=")).removeprefix("--out="))
        if self.reports:
            write_report(out / "report.json", self.reports[0])
            lines = b"".join(msgspec.json.encode(report) + b"\n" for report in self.reports)
            (out / "results.jsonl").write_bytes(lines)
        return subprocess.CompletedProcess(command, 0, "", self.ending)


def commands(monkeypatch: pytest.MonkeyPatch, *arguments: Any) -> Commands:
    made = Commands(*arguments)
    monkeypatch.setattr("distbench.api.subprocess.run", made)
    return made


def test_keys_become_flags(monkeypatch: pytest.MonkeyPatch) -> None:
    made = commands(monkeypatch, "", report_of(tiny_case(), ""))
    case = Case(model="tiny", tokens=[1, "..."], bias=True, emulate=False, limit=64, inject="")
    report = api.run(case, ranks=4)
    flags = ["--model=tiny", "--tokens=1,...", "--bias", "--no-emulate", "--limit=64", "--inject="]
    assert made.given == [["run", "--nproc=4", *flags]]
    assert report.verdict == "PASS"
    assert json.loads(report.to_json())["name"] == "made up"
    api.sweep(Case(ep_size=2), limits="4,8")
    assert made.given[1] == ["sweep", "--limits=4,8", "--nproc=2"]


def test_report_as_text_is_its_verdict_and_diagnosis(monkeypatch: pytest.MonkeyPatch) -> None:
    commands(monkeypatch, "", report_of(tiny_case(), "rows lost"))
    assert str(api.run(Case())) == "CORRUPT\ndiagnosis: rows lost (certain): made up"


@pytest.mark.parametrize(
    ("told", "kind", "message"),
    [
        ("note\ndistbench: INVALID: topk = 9: too many", InvalidCase, "^topk = 9: too many$"),
        ("distbench: UNSUPPORTED: no GPU", api.Unsupported, "^no GPU$"),
        ("distbench: DISK_FULL: /x: full; free some space", api.DiskFull, "^/x: full; free some space$"),
        ("distbench: BUSY: in use", api.Busy, "^in use$"),
        ("Traceback\nKeyError: 1", api.DistbenchError, "(?s)^distbench ended without a report: .*KeyError: 1$"),
    ],
)
def test_command_without_a_report_is_an_error_of_its_ending(
    told: str, kind: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(monkeypatch, told)
    for call in (lambda: api.run(Case()), lambda: api.suite("smoke"), lambda: api.sweep(Case())):
        with pytest.raises(kind, match=message):
            call()


def test_report_of_an_earlier_run_is_none_of_a_command_that_failed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(monkeypatch, "", report_of(tiny_case(), ""))
    assert api.run(Case(), out=tmp_path).verdict == "PASS"
    commands(monkeypatch, "distbench: BUSY: in use")
    for call in (
        lambda: api.run(Case(), out=tmp_path),
        lambda: api.suite("smoke", out=tmp_path),
        lambda: api.sweep(Case(), out=tmp_path),
    ):
        with pytest.raises(api.Busy, match=r"^in use$"):
            call()


def test_cases_without_a_result_and_a_killed_command_are_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commands(monkeypatch, "", report_of(tiny_case(), ""))
    (tmp_path / "summary.json").write_text(
        '{"cases": 3, "finished": 1, "stopped": "1 cases in a row lost their ranks"}'
    )
    with pytest.raises(api.LaunchFailed, match=r"^1 of 3 cases with a result: 1 cases in a row lost their ranks; the"):
        api.suite("smoke", out=tmp_path)
    killed = subprocess.CompletedProcess([], -9, "", "")
    monkeypatch.setattr("distbench.api.subprocess.run", lambda *_, **__: killed)
    with pytest.raises(api.LaunchFailed, match=r"^distbench suite was ended by signal 9; call it again$"):
        api.suite("smoke", out=tmp_path)


def test_case_that_its_ranks_refuse_is_an_error_too(monkeypatch: pytest.MonkeyPatch) -> None:
    report = report_of(tiny_case(), "x", api.Verdict.UNSUPPORTED)
    reasons = [Reason(code="unsupported", message="no such device")]
    commands(monkeypatch, "", msgspec.structs.replace(report, reasons=reasons))
    with pytest.raises(api.Unsupported, match="no such device"):
        api.run(Case())


def test_suite_by_name_takes_a_selection_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    made = commands(monkeypatch, "", report_of(tiny_case(), ""), report_of(tiny_case(), "rows lost"))
    reports = api.suite("smoke", ranks=2, select="tag", seed=7)
    assert made.given == [["suite", "smoke", "--quiet", "--select=tag", "--nproc=2", "--seed=7"]]
    assert [report.verdict.value for report in reports] == ["PASS", "CORRUPT"]
    with pytest.raises(InvalidCase, match="only of a suite by name or file"):
        api.suite([Case()], select="tag")


def test_interface_refuses_to_launch_from_a_rank_of_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    with pytest.raises(InvalidCase, match=r"^run: this process is a rank of torchrun; use run_in_group"):
        api.run(Case())


def test_sequence_is_a_launch_for_each_plugin_and_has_its_reports_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {name: report_of(tiny_case(), "x" if name == "1" else "", name=name) for name in ("0", "1", "3")}
    made = commands(monkeypatch, "", *cases.values())
    base = Case(model="tiny", tokens=3, numerics="exact")
    wrong = base.but(transport="own:make", transport_option={"factor": 3})
    found = api.suite([base, wrong, base, base.but(seed=1)], ranks=2, repeats=2)
    assert [report.name for report in found] == ["0", "1", "0", "3"]
    flags = [given[3:] for given in made.given]
    assert [given.pop(0) for given in flags] == ["--max-faults=4", "--max-faults=2"]
    assert flags == [["--nproc=2"], ["--nproc=2", "--transport=own:make", "--transport-option=factor=3"]]
    path = Path(made.given[1][1])
    assert (path.parent.name, path.name) == ("launch-1", "cases.json")


@pytest.mark.parametrize("expect", [[], ["PASS", "PASS"]])
def test_expectations_of_another_number_than_cases_are_refused(expect: list[str]) -> None:
    with pytest.raises(InvalidCase, match=f"expect: {len(expect)} endings? for 1 case; give one for each"):
        api.suite([Case(model="tiny")], expect=expect)
