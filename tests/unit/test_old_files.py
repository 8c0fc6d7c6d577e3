"""Files of commit e296384, which ran a case with one kind of inputs, are still read and compared."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from distbench.bundle.analysis import analyse
from distbench.bundle.read import open_bundle
from distbench.cli import main
from distbench.errors import Verdict
from distbench.report.files import read_report
from distbench.report.journal import JournalReader, expect_anew, unfinished
from distbench.report.results import Results
from distbench.resolve import load_case_file, resolve_case
from distbench.suite import load_suite

OLD = Path("tests/data/e296384")
REPORTS = {"pass": "PASS", "under-limit": "UNDER_LIMIT", "nondeterministic": "NONDETERMINISTIC"}
JOURNALS = {"one": ["PASS", "PASS"], "two": ["NONDETERMINISTIC"] * 2, "three": ["OVERFLOW", "CORRUPT"]}
NUMERICS = {"default": "both", "exact": "exact", "gaussian": "gaussian"}
BUNDLES = {
    "f725580088e4": ("UNDER_LIMIT", "UNDER_LIMIT"),
    "a3f8b2ac3ca2": ("BASELINE_WRONG", "BASELINE_WRONG"),
    "25b31d924976": ("NONDETERMINISTIC", "CORRUPT"),
}
"""The verdict in the report, and the one that its recording leads to now: a NaN is no kernel's rounding."""
OTHER_INPUTS = {"f725580088e4", "a3f8b2ac3ca2"}
"""Exact inputs have had probes since: those generated now are not the recorded ones, and confirm nothing."""


@pytest.mark.parametrize("name", REPORTS)
def test_show_prints_a_report_of_commit_e296384(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = OLD / "reports" / f"{name}.json"
    assert main(["show", str(path)]) in (0, 1)
    assert capsys.readouterr().out.splitlines()[-1].startswith(REPORTS[name])
    report = read_report(str(path))
    assert (report.findings, report.errors, report.blind_spots) == ([], [], [])


@pytest.mark.parametrize("name", JOURNALS)
@pytest.mark.parametrize("kind", ["junit", "md", "csv", "prom", "json"])
def test_report_converts_an_old_journal_to_other_formats(name: str, kind: str, tmp_path: Path) -> None:
    folder = tmp_path / name
    shutil.copytree(OLD / "journals" / name, folder)
    unexpected = sum(not result.as_expected for result in Results(folder))
    assert main(["report", str(folder), "--report", kind]) == int(unexpected > 0)
    assert [result.verdict.value for result in Results(folder)] == JOURNALS[name]


@pytest.mark.parametrize("name", JOURNALS)
def test_compare_finds_no_change_in_an_old_journal(name: str) -> None:
    assert main(["compare", str(OLD / "journals" / name), str(OLD / "journals" / name)]) in (0, 77)


def test_compare_reports_changes_between_old_reports() -> None:
    first, other = (str(OLD / "reports" / f"{name}.json") for name in ("pass", "under-limit"))
    assert main(["compare", first, first]) in (0, 77)
    assert main(["compare", first, other]) == 1


@pytest.mark.parametrize("name", JOURNALS)
def test_a_suite_resumes_over_an_old_journal(name: str, tmp_path: Path) -> None:
    shutil.copy(OLD / "journals" / name / "results.jsonl", tmp_path)
    entries = load_suite(str(OLD / "suites" / f"{name}.toml"), 2).entries
    lines = list(JournalReader(tmp_path).new_lines())
    assert [line.verdict.value for line in lines] == JOURNALS[name]
    assert len(unfinished(tmp_path, entries)) == len(entries)  # a case now has further keys, and another hash
    expect_anew(tmp_path, entries)
    assert len(list(JournalReader(tmp_path).new_lines())) == len(lines)


@pytest.mark.parametrize("name", JOURNALS)
def test_old_result_is_judged_by_its_expectation(name: str) -> None:
    entries = {entry.name: entry for entry in load_suite(str(OLD / "suites" / f"{name}.toml"), 2).entries}
    for line in JournalReader(OLD / "journals" / name).new_lines():
        assert line.ended_as(entries[line.name]) is line.as_expected


@pytest.mark.parametrize("name", NUMERICS)
def test_old_case_file_keeps_its_numerics(name: str) -> None:
    layer = load_case_file(str(OLD / "cases" / f"{name}.toml"))
    assert resolve_case([layer], 2).case.numerics == NUMERICS[name]


@pytest.mark.parametrize("name", BUNDLES)
def test_old_bundle_is_judged_with_its_recorded_verdict(name: str) -> None:
    bundle = open_bundle(OLD / "bundles" / name)
    analysis = analyse(bundle)
    assert analysis.judgement is not None
    assert (bundle.report.verdict.value, analysis.judgement.verdict.value) == BUNDLES[name]
    agrees = len(set(BUNDLES[name])) == 1 and name not in OTHER_INPUTS
    assert analysis.trusted is (name not in OTHER_INPUTS)
    assert analysis.confirms(Verdict(BUNDLES[name][0]), [found.cause for found in bundle.report.diagnosis]) is agrees


@pytest.mark.parametrize("name", BUNDLES)
def test_replay_analyses_an_old_bundle(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    agrees = len(set(BUNDLES[name])) == 1 and name not in OTHER_INPUTS
    assert main(["replay", str(OLD / "bundles" / name), "--offline"]) == (0 if agrees else 1)
    said = capsys.readouterr().out
    assert f"from the recording: {BUNDLES[name][1]}" in said
    assert ("not confirmed: the inputs generated here" in said) is (name in OTHER_INPUTS)
