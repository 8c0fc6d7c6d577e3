"""Results read back: each case once, and no line that is not a result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from distbench.cli.main import main
from distbench.errors import InvalidCase
from distbench.report.results import Results
from tests.results import result, write_results


def test_first_of_two_results_of_a_case_counts_and_a_torn_line_is_ignored(tmp_path: Path) -> None:
    write_results(tmp_path, [result("a"), result("b", "CORRUPT"), result("a", "CORRUPT")])
    with (tmp_path / "results.jsonl").open("ab") as file:
        file.write(b'{"schema":"distbench.rep')
    assert [(one.name, one.verdict.value) for one in Results(tmp_path)] == [("a", "PASS"), ("b", "CORRUPT")]
    assert [one.name for one in Results(tmp_path, lambda digest: digest == "hash of b")] == ["b"]


@pytest.mark.parametrize(
    "damage",
    [
        {"schema": "distbench.report/0"},
        {"verdict": "FINE"},
        {"case": {"hash": None}},
        {"case": {}},
        {"timing": {}},
        {"timing": {"wall_s": "soon"}},
        {"as_expected": None},
    ],
)
def test_line_that_is_no_report_is_refused_with_its_number(tmp_path: Path, damage: dict[str, Any]) -> None:
    write_results(tmp_path, [result("a"), result("b") | damage])
    with pytest.raises(InvalidCase, match=r"results.jsonl, line 2: .*distbench.report/1"):
        list(Results(tmp_path))


def test_a_folder_without_results_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidCase, match="No such file"):
        list(Results(tmp_path))
    write_results(tmp_path, [result()], cases=1)
    (tmp_path / "summary.json").write_bytes(b"{")
    with pytest.raises(InvalidCase, match=r"summary.json"):
        _ = Results(tmp_path).exit_code


def test_suite_without_any_result_reports_all_cases_missing(tmp_path: Path) -> None:
    write_results(tmp_path, [], cases=3)
    (tmp_path / "results.jsonl").unlink()
    results = Results(tmp_path)
    assert (list(results), results.missing, results.exit_code) == ([], 3, 3)


@pytest.mark.parametrize(
    ("reports", "cases", "code"),
    [
        ([result("a")], 1, 0),
        ([result("a")], None, 0),
        ([result("a")], 2, 3),
        ([result("a"), result("b", "CORRUPT")], 2, 1),
        ([result("a", "CORRUPT"), result("b", "HANG")], 2, 3),
        ([result("a"), result("b", "UNSUPPORTED")], 2, 77),
        ([result("a", as_expected=False, expect="UNDER_LIMIT")], 1, 1),
        ([result("a", "UNDER_LIMIT", as_expected=True, expect="UNDER_LIMIT")], 1, 0),
    ],
)
def test_report_command_exits_with_the_code_of_the_suite(
    tmp_path: Path, reports: list[dict[str, Any]], cases: int | None, code: int
) -> None:
    write_results(tmp_path, reports, cases)
    assert main(["report", str(tmp_path), "--report", f"json={tmp_path}/elsewhere/all.json"]) == code
    assert (tmp_path / "elsewhere" / "all.json").exists()


def test_missing_library_of_a_report_format_is_named_before_any_case_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "junitparser", None)
    monkeypatch.delitem(__import__("sys").modules, "distbench.report.export.junit", raising=False)
    write_results(tmp_path, [result()])
    assert main(["report", str(tmp_path), "--report", "junit"]) == 77
    assert "junitparser" in capsys.readouterr().err
