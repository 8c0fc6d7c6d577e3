"""Every report format, read back by an independent parser."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree
from markdown_it import MarkdownIt
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics
from prometheus_client.parser import text_string_to_metric_families as parse_prometheus

from distbench.case.stages import LAYER_STAGES, OWN_ARMS
from distbench.cli.main import main
from distbench.errors import InvalidCase, Verdict
from distbench.report.export import FILES, load_writers, parse_targets, write_reports
from distbench.report.export.markdown import escape
from distbench.report.results import Results
from tests.results import result, write_results

HOSTILE = [
    "]]><x/>\x00\x1b[31m",
    '"quoted", and\r\nbroken | ` \\| `',
    "=cmd|' /C calc'!A0",
    "<script>alert(1)</script> &amp; &#0; [x](javascript:1)",
    "\ufffe\x85\u2028\U0001f600 **bold** $x$",
    "-1+1",
    "\t@x",
    " # heading \n---\n",
]
SUITE = [
    result("good"),
    result("wrong", "CORRUPT"),
    result("stuck", "HANG"),
    result("absent", "UNSUPPORTED"),
    result("surprise", "PASS", as_expected=False, expect="UNDER_LIMIT"),
    result("short", "UNDER_LIMIT", as_expected=True, expect="UNDER_LIMIT"),
]


FOR_TOOLS = [name for name in FILES if name != "html"]
"""The formats of summaries; tests/unit/report/html has the page, which needs whole reports."""


def write(folder: Path, reports: list[dict[str, Any]], cases: int | None = None) -> dict[str, str]:
    """Write every format of FOR_TOOLS; return the texts by format."""
    results = Results(write_results(folder, reports, cases))
    targets = parse_targets(",".join(FOR_TOOLS), folder)
    write_reports(results, load_writers(targets))
    return {name: path.read_bytes().decode() for name, path in targets.items()}


def test_junit_is_parsed_by_lxml_with_expected_outcomes(tmp_path: Path) -> None:
    root = etree.fromstring(write(tmp_path, SUITE, cases=8)["junit"].encode())
    (suite,) = root.findall("testsuite")
    kinds = {case.get("name"): [child.tag for child in case] for case in suite.findall("testcase")}
    assert kinds == {
        "good": ["system-out"],
        "wrong": ["failure", "system-out"],
        "stuck": ["error", "system-out"],
        "absent": ["skipped", "system-out"],
        "surprise": ["failure", "system-out"],
        "short": ["system-out"],
        "cases without a result": ["error"],
    }
    counts = [suite.get(key) for key in ("tests", "failures", "errors", "skipped")]
    assert counts == ["7", "2", "2", "1"]
    (failure,) = suite.findall("testcase[@name='wrong']/failure")
    assert (failure.get("type"), failure.get("message")) == ("CORRUPT", "CORRUPT: wrong ended in CORRUPT")
    assert "why: wrong ended in CORRUPT" in str(failure.text)
    assert "emulated: collective for mori" in str(failure.text)
    (missing,) = suite.findall("testcase[@name='cases without a result']/error")
    assert missing.get("message") == "2 cases of the suite without a result"


@pytest.mark.skipif("JUNIT_XSD" not in os.environ, reason="needs JUNIT_XSD, the path of a published JUnit schema")
def test_junit_is_valid_under_its_xsd(tmp_path: Path) -> None:
    schema = etree.XMLSchema(etree.parse(os.environ["JUNIT_XSD"]))
    hostile = [result(name, "CORRUPT") for name in HOSTILE]
    schema.assertValid(etree.fromstring(write(tmp_path, SUITE + hostile, cases=80)["junit"].encode()))


def test_prometheus_text_is_parsed_by_other_parsers_with_expected_samples(tmp_path: Path) -> None:
    text = write(tmp_path, SUITE, cases=8)["prom"]
    samples = {
        (
            sample.name,
            *sorted(value for name, value in sample.labels.items() if name not in ("suite", "case")),
        ): sample.value
        for family in parse_prometheus(text)
        for sample in family.samples
    }
    openmetrics = [sample for family in parse_openmetrics(text + "# EOF\n") for sample in family.samples]
    assert len(openmetrics) == len(samples)
    assert samples["distbench_cases", "CORRUPT"] == 1
    assert samples["distbench_cases", "PASS"] == 2
    assert samples["distbench_cases_unexpected", "PASS"] == 1
    assert samples["distbench_cases_unexpected", "UNDER_LIMIT"] == 0
    assert samples["distbench_cases_missing",] == 2
    assert samples["distbench_exit_code",] == 3
    assert samples["distbench_as_expected_ratio",] == 2 / 8
    assert samples["distbench_stage_seconds", "checked", "median", "padded", "truncate"] == pytest.approx(2e-6)
    if shutil.which("promtool"):
        done = subprocess.run(["promtool", "check", "metrics"], input=text.encode(), capture_output=True, check=False)  # noqa: S607
        assert (done.returncode, done.stderr) == (0, b"")


def series(text: str) -> set[tuple[str, frozenset[tuple[str, str]]]]:
    """Names and labels of every sample; an empty label is none."""
    return {
        (sample.name, frozenset((name, value) for name, value in sample.labels.items() if value))
        for family in parse_prometheus(text)
        for sample in family.samples
    }


@pytest.mark.parametrize("command", ["run", "sweep"])
def test_prometheus_files_of_two_runs_with_other_cases_share_no_series(tmp_path: Path, command: str) -> None:
    def text(folder: str, *seeds: int) -> str:
        (tmp_path / folder).mkdir()
        named = {"suite": f"distbench {command}"}
        cases = [{"model": "tiny", "ep_size": 2, "hash": f"{seed:064x}"[::-1]} for seed in seeds]
        return write(tmp_path / folder, [result("run", case=case, **named) for case in cases])["prom"]

    seeds = (1, 2) if command == "sweep" else (1,)
    first, again, other = text("a", *seeds), text("b", *reversed(seeds)), text("c", *(seed + 7 for seed in seeds))
    assert series(first) == series(again)
    assert not series(first) & series(other)
    if command == "run":
        assert 'distbench_exit_code{case="100000000000",suite="distbench run"}' in first


def test_prometheus_series_of_a_suite_do_not_depend_on_its_cases(tmp_path: Path) -> None:
    named = [result(name, suite="night") for name in ("a", "b")]
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert series(write(tmp_path / "a", named)["prom"]) == series(write(tmp_path / "b", named[:1])["prom"])


def test_every_format_labels_times_as_timed_iterations_or_checked_passes(tmp_path: Path) -> None:
    timed = {"median_us": 5.0, "median_error": 0.1, "iterations": 9, "samples_us": [5.0]}
    checked = {"median_us": 70.0, "iterations": 1, "samples_us": [70.0]}
    times = {"padded": {"experts": timed}, "control": {"experts": checked}, "wall_s": 1.0}
    written = write(
        tmp_path, [result("timed", timing=times), result("not timed", timing=times | {"padded": times["control"]})]
    )
    found = {
        (sample.labels["arm"], sample.labels["samples"]): sample.value
        for family in parse_prometheus(written["prom"])
        for sample in family.samples
        if sample.name == "distbench_stage_seconds" and sample.labels["statistic"] == "max"
    }
    assert found == {
        ("padded", "timed"): pytest.approx(5e-6),
        ("padded", "checked"): pytest.approx(70e-6),
        ("control", "checked"): pytest.approx(70e-6),
    }
    rows = list(csv.DictReader(io.StringIO(written["csv"], newline="")))
    assert [row["timed_arms"] for row in rows] == ["padded", ""]
    assert ["padded", "experts", "timed", "5.0", "5.0", "5.0", "1"] in markdown_cells(written["md"])


def test_format_written_to_standard_output_is_the_only_output(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_results(tmp_path, SUITE)
    assert main(["report", str(tmp_path), "--report", "json=-", "--report", f"md={tmp_path}/results.md"]) == 3
    printed = capsys.readouterr().out
    document, _, rest = printed.partition("\n],")
    assert json.loads(document + "\n]," + rest.splitlines()[0])["exit_code"] == 3
    assert rest.splitlines()[1:] == [f"{tmp_path}/results.md"]


def test_repeated_report_options_accumulate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_results(tmp_path, [result()])
    assert main(["report", str(tmp_path), "--report=md,csv", "--report=junit"]) == 0
    assert {path.name for path in tmp_path.glob("*.*")} == {"results.jsonl", "results.md", "results.csv", "junit.xml"}
    for again in (("md", "md"), ("md=a", "csv=a"), ("md=-", "csv=-")):
        capsys.readouterr()
        assert main(["report", str(tmp_path), *(f"--report={one}" for one in again)]) == 2
        assert "distbench: INVALID: report " in capsys.readouterr().err


NAMED = {"suite": "night", "ended": "2026-11-30T05:47:25Z"}


def junit_names(folder: Path, suite: str, *hashes: str) -> list[str]:
    reports = [result("run", suite=suite, case={"model": "tiny", "hash": digest * 64}) for digest in hashes]
    return [
        str(case.get("name")) for case in etree.fromstring(write(folder, reports)["junit"].encode()).iter("testcase")
    ]


def test_junit_names_of_a_commands_cases_end_in_the_hash_and_those_of_suites_do_not(tmp_path: Path) -> None:
    assert junit_names(tmp_path / "one", "distbench run", "a") == [f"run {'a' * 12}"]
    assert junit_names(tmp_path / "two", "distbench run", "b") == [f"run {'b' * 12}"]
    assert junit_names(tmp_path / "suite", "night", "c", "d") == ["run", "run"]


def test_junit_of_two_suites_keeps_their_cases_apart(tmp_path: Path) -> None:
    seen: set[tuple[str, str]] = set()
    for name in ("night", "day.short"):
        made = [
            result("same name", "UNDER_LIMIT", lost={"rows": 3}, **NAMED | {"suite": name}),
            result("other", **NAMED),
        ]
        root = etree.fromstring(write(tmp_path / name, made[:1], cases=2)["junit"].encode())
        (suite,) = root.findall("testsuite")
        assert (suite.get("name"), suite.get("hostname"), suite.get("timestamp")) == (
            name,
            "node0",
            "2026-11-30T05:47:25",
        )
        cases = {(str(case.get("classname")), str(case.get("name"))) for case in suite.findall("testcase")}
        assert len(cases) == 2
        assert not cases & seen
        seen |= cases
        (told,) = (case.findtext("system-out") for case in suite.iter("testcase") if case.get("name") == "same name")
        assert "limit sum32 → 32 rows" in str(told)
        assert "the fullest rank receives 6" in str(told)
        assert "lost rows: 3" in str(told)
        assert "hosts: node0 node1\nended: 2026-11-30T05:47:25Z" in str(told)


def test_prometheus_files_of_two_suites_have_no_series_in_common(tmp_path: Path) -> None:
    series: list[set[tuple[str, tuple[tuple[str, str], ...]]]] = []
    for name in ("night", "day"):
        text = write(tmp_path / name, [result(lost={"rows": 3}, **NAMED | {"suite": name})])["prom"]
        samples = [sample for family in parse_prometheus(text) for sample in family.samples]
        assert {sample.labels["suite"] for sample in samples} == {name}
        series.append({(sample.name, tuple(sorted(sample.labels.items()))) for sample in samples})
        values = {(one.name, one.labels.get("statistic", "")): one.value for one in samples}
        assert values["distbench_lost_rows", ""] == 3
        assert values["distbench_max_recv_rows", ""] == 6
        assert values["distbench_limit_rows", "min"] == 32
        assert values["distbench_ended_timestamp_seconds", ""] == 1796017645
        assert "node0" in {sample.labels.get("host") for sample in samples}
    assert not series[0] & series[1]


def test_csv_and_markdown_name_suite_and_time(tmp_path: Path) -> None:
    written = write(tmp_path, [result("wrong", "CORRUPT", lost={"rows": 3}, **NAMED)])
    (row,) = csv.DictReader(io.StringIO(written["csv"], newline=""))
    assert (row["suite"], row["ended"], row["lost_rows"], row["max_recv"]) == (*NAMED.values(), "3", "6")
    assert written["md"].startswith("# distbench night: exit 1, ")
    assert "from 2026" in written["md"]
    assert ["verdict", "expected", "case", "limit", "lost rows", "reason"] in markdown_cells(written["md"])


def test_number_of_prometheus_series_is_bounded(tmp_path: Path) -> None:
    few = write(tmp_path, SUITE)["prom"].splitlines()
    strange = {"padded": {f"stage {number}": {"median_us": 1.0} for number in range(50)}, "wall_s": 1.0}
    many = [result(f"case {number}", timing=strange | {f"arm {number}": strange["padded"]}) for number in range(50)]
    assert len(write(tmp_path, SUITE + many)["prom"].splitlines()) == len(few)


def test_csv_has_one_row_per_case(tmp_path: Path) -> None:
    rows = list(csv.DictReader(io.StringIO(write(tmp_path, SUITE)["csv"], newline="")))
    assert [row["name"] for row in rows] == [report["name"] for report in SUITE]
    assert [row["verdict"] for row in rows] == [report["verdict"] for report in SUITE]
    assert {row["emulated"] for row in rows} == {"true"}
    assert rows[1]["reason"] == "wrong ended in CORRUPT"
    assert [float(rows[0][f"{arm}_{stage}_median_us"]) for arm in OWN_ARMS for stage in LAYER_STAGES] == [2.0] * 16


def test_json_contains_the_reports_unchanged(tmp_path: Path) -> None:
    document = json.loads(write(tmp_path, SUITE, cases=7)["json"])
    assert document["results"] == SUITE
    assert (document["missing"], document["exit_code"], document["verdicts"]["PASS"]) == (1, 3, 2)


def test_markdown_states_exit_code_failures_and_missing_results(tmp_path: Path) -> None:
    text = write(tmp_path, SUITE, cases=8)["md"]
    assert "exit 3, 2 of 8 as expected" in text
    assert "2 cases without a result" in text
    cells = markdown_cells(text)
    assert [row[:3] + row[5:] for row in cells if row[:1] == ["CORRUPT"]][-1:] == [
        ["CORRUPT", "PASS", "wrong", "wrong ended in CORRUPT"]
    ]
    assert ["PASS", "2", "1"] in cells
    assert ["padded", "dispatch", "checked", "2.0", "2.0", "2.0", "6"] in cells
    many = [result(f"case {number}", "CORRUPT") for number in range(60)]
    assert "and 10 more" in write(tmp_path, many)["md"]


def markdown_cells(text: str) -> list[list[str]]:
    """Rows of all tables as a Markdown renderer parses them."""
    rows: list[list[str]] = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        if token.type == "tr_open":
            rows.append([])
        if token.type == "inline" and rows:
            assert all(child.type in {"text", "text_special"} for child in token.children or ())
            rows[-1].append("".join(child.content for child in token.children or ()))
    return rows


@given(text=st.text() | st.sampled_from(HOSTILE))
def test_any_text_renders_literally_in_a_markdown_table(text: str) -> None:
    shown = "".join(one if one.isprintable() else "�" for one in " ".join(text.split())[:300])
    rows = markdown_cells(f"| a | b |\n| --- | --- |\n| {escape(text)} | end |\n")
    assert rows[1][1] == "end"
    if len(text) < 300:
        assert rows[1][0] == shown.strip()


def test_hostile_case_names_stay_literal_in_every_format(tmp_path: Path) -> None:
    texts = write(tmp_path, [result(name, "CORRUPT", reasons=[{"code": name, "message": name}]) for name in HOSTILE])
    assert [one["name"] for one in json.loads(texts["json"])["results"]] == HOSTILE
    rows = list(csv.DictReader(io.StringIO(texts["csv"], newline="")))
    assert [row["name"].removeprefix("'") for row in rows] == HOSTILE
    assert not any(row["name"].startswith(("=", "+", "-", "@", "\t", "\r")) for row in rows)
    suite = etree.fromstring(texts["junit"].encode())
    assert len(suite.findall(".//testcase")) == len(suite.findall(".//failure")) == len(HOSTILE)
    assert suite.findall(".//testcase")[0].get("name") == r"]]><x/>\u0000\u001b[31m"
    assert len([row for row in markdown_cells(texts["md"]) if row[1] == "PASS"]) == len(HOSTILE)
    list(parse_prometheus(texts["prom"]))


def test_empty_results_fail_in_every_format(tmp_path: Path) -> None:
    texts = write(tmp_path, [], cases=3)
    assert json.loads(texts["json"])["exit_code"] == Verdict.RANK_FAULT.exit_code
    assert "0 of 3" in texts["md"]
    assert [suite.get("errors") for suite in etree.fromstring(texts["junit"].encode()).findall("testsuite")] == ["1"]


def test_report_files_are_readable_by_others_and_kept_if_a_rewrite_fails(tmp_path: Path) -> None:
    write(tmp_path, SUITE)
    before = os.umask(0o022)
    try:
        write(tmp_path, SUITE)
    finally:
        os.umask(before)
    assert {(tmp_path / FILES[name]).stat().st_mode & 0o777 for name in FOR_TOOLS} == {0o644}
    (tmp_path / "results.jsonl").write_bytes(b"{}\n")
    kept = (tmp_path / "results.prom").read_bytes()
    with pytest.raises(InvalidCase, match="line 1"):
        write_reports(Results(tmp_path), load_writers(parse_targets("prom", tmp_path)))
    assert (tmp_path / "results.prom").read_bytes() == kept
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("text", ["xml", "junit,junit", "md=", "JUNIT", "junit;md"])
def test_unknown_report_format_is_refused(text: str) -> None:
    with pytest.raises(InvalidCase, match="allowed are html, junit, md, csv, prom, json"):
        parse_targets(text, Path("out"))


def test_report_format_with_a_path_writes_to_it() -> None:
    assert parse_targets("prom=/x/a.prom, md", Path("out")) == {"prom": Path("/x/a.prom"), "md": Path("out/results.md")}
