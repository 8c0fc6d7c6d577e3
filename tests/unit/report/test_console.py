"""No text from a report, journal or table reaches a terminal as a control sequence."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from distbench.cli.main import main
from distbench.errors import Verdict
from distbench.report import console, terminal
from distbench.report.files import write_report
from distbench.report.findings import ErrorReport
from distbench.report.journal import Journal, JournalReader, Summary
from distbench.report.limit import LimitReport
from distbench.report.progress import Progress
from distbench.report.schema import ComparisonReport, InjectedReport, LostReport, RankReport, Report
from distbench.report.sweep import COLUMNS, sweep_row
from distbench.utils.text import printable
from distbench.verify.records import Diagnosis, Reason
from tests.cases import tiny_case
from tests.reports import report_of
from tests.results import limit, result, write_results

# Colour, title, a hyperlink, C1's CSI, a bidi override, a line that is forged, markup of rich, half a surrogate pair.
HOSTILE = "a\x1b[31mred\x1b]0;title\x07\x9b2J\u202egnp\r\nPASS: forged [bold]x[/bold] [/nothing]"
SHOWN = "a\\x1b[31mred\\x1b]0;title\\x07\\x9b2J\\u202egnp\\r\\nPASS: forged [bold]x[/bold] [/nothing]"


def harmless(text: str) -> bool:
    return all(one.isprintable() or one == "\n" for one in text)


@pytest.fixture
def hostile() -> Report:
    """Return a report whose every text is hostile."""
    made = report_of(tiny_case(2), "x", name=HOSTILE)
    kernel = dict.fromkeys(("label", "stage1", "stage2"), HOSTILE)
    rank = RankReport(
        rank=0,
        host=HOSTILE,
        device=HOSTILE,
        tokens=1,
        total_recv=1,
        capacity=1,
        limit=1,
        lost_rows=1,
        kernels={"padded": kernel, "truncated": kernel},
        digests={},
        peak_bytes=0,
        packages={},
    )
    case = made.case | dict.fromkeys(("model", "routing", "transport", "experts", "inject", "limit"), HOSTILE)
    return msgspec.structs.replace(
        made,
        suite=HOSTILE,
        expect=HOSTILE,
        stand_ins=[HOSTILE],
        warnings=[HOSTILE],
        reasons=[Reason(code=HOSTILE, message=HOSTILE)] * 2,
        diagnosis=[Diagnosis(cause=HOSTILE, confidence="certain", evidence=HOSTILE)],
        injected=[InjectedReport(name=HOSTILE, options={HOSTILE: HOSTILE}, hits={HOSTILE: 1}, needs=HOSTILE)],
        case=case,
        limit=msgspec.structs.replace(msgspec.convert(limit(), LimitReport), requested=HOSTILE, source=HOSTILE),
        ranks=[rank],
        comparison=[
            ComparisonReport(
                arms=(HOSTILE, HOSTILE), equal=False, tokens=1, differing_tokens=1, differing_elements=1, max_ulp=1
            )
        ],
        lost=LostReport(rows=1, tokens=[(0, 0)], by_rank={HOSTILE: 1}),
        timing=made.timing
        | {HOSTILE: {HOSTILE: {"min_us": 1.0, "median_us": 1.0, "p99_us": 1.0, "iterations": 1, "median_error": 0.1}}},
        method={"clock": HOSTILE, "align": HOSTILE, "l2": HOSTILE, "graph": False},
    )


def test_unprintable_characters_are_shown_as_escapes() -> None:
    assert printable(HOSTILE) == SHOWN
    assert printable("µ → ✓ 漢 \udc80") == "µ → ✓ 漢 \\udc80"


def test_show_prints_no_control_sequence(tmp_path: Path, hostile: Report, capsys: pytest.CaptureFixture[str]) -> None:
    write_report(tmp_path / "report.json", hostile)
    assert main(["show", str(tmp_path / "report.json")]) == 0
    text = capsys.readouterr().out
    assert harmless(text)
    assert "\\x1b[31mred" in text
    assert "[bold]x[/bold]" in text
    assert not any(line.startswith("PASS") for line in text.splitlines())


@pytest.mark.parametrize(
    "printing",
    [
        lambda made: terminal.print_line(console.case_line(made)),
        lambda made: terminal.print_note(made.name),
        lambda made: terminal.print_error(made.name, made.name),
        lambda made: terminal.print_json({"text": made.name}),
        lambda made: terminal.print_table([(made.name,) * 2], ("a", "b")),
        lambda made: console.print_sweep([sweep_row(made).cells()], COLUMNS, [made.name]),
        lambda made: console.print_summary(
            Summary(
                events=[made.name],
                stopped=made.name,
                unexpected=[{"verdict": made.name, "name": made.name}],
                verdicts={made.name: 1},
                limits={made.name: 1},
            ),
            made.name,
        ),
    ],
)
def test_console_report_prints_no_control_sequence(
    printing: Callable[[Report], None], hostile: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    printing(msgspec.structs.replace(hostile, case=hostile.case | {"hash": "0"}))
    told = capsys.readouterr()
    assert harmless(told.out + told.err)
    assert "31mred" in told.out + told.err


def test_json_on_standard_output_reads_back(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.print_json({HOSTILE: "\U000e0001"})
    assert json.loads(capsys.readouterr().out) == {HOSTILE: "\U000e0001"}


def test_progress_and_compare_print_no_control_sequence(
    tmp_path: Path, hostile: Report, capsys: pytest.CaptureFixture[str]
) -> None:
    journal = Journal(tmp_path)
    journal.append(hostile)
    journal.close()
    stream = io.StringIO()
    progress = Progress(1, quiet=False, stream=stream)
    for line in JournalReader(tmp_path).new_lines():
        progress.take(line)
    assert harmless(stream.getvalue())
    environment = {"hosts": [HOSTILE], "devices": [], "versions": {HOSTILE: HOSTILE}, "commits": {}, "variables": {}}
    folders = [
        str(write_results(tmp_path / name, [result(HOSTILE, verdict, **more)]))
        for name, verdict, more in (("old", "PASS", {}), ("new", "CORRUPT", {"environment": environment}))
    ]
    assert main(["compare", *folders]) == 1
    text = capsys.readouterr().out
    assert harmless(text)
    assert "31mred" in text


def test_message_about_a_hostile_file_holds_no_control_sequence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["show", f"{tmp_path}/{HOSTILE}.json"]) == 2
    (tmp_path / "report.json").write_text(json.dumps({"schema": HOSTILE, "verdict": HOSTILE}))
    assert main(["show", str(tmp_path / "report.json")]) == 2
    text = capsys.readouterr().err
    assert harmless(text)
    assert len(text.splitlines()) == 2


@pytest.mark.parametrize(("ideal_worst", "told"), [(0.004, "errors 1.00 to 1.00 of ideal"), (0.0, "")])
def test_verdict_tells_no_ratio_of_errors_where_ideal_roundings_have_none(ideal_worst: float, told: str) -> None:
    error = ErrorReport(
        arm="padded",
        stage="experts",
        family="bf16",
        rows=4,
        nan_rows=0,
        ratio=(1.0, 1.0),
        bias=0.0,
        worst=ideal_worst,
        ideal_worst=ideal_worst,
        allowed={},
        within=True,
        outside=[],
    )
    made = report_of(tiny_case(2), "x")
    report = msgspec.structs.replace(made, verdict=Verdict.PASS, errors=[error], reasons=[], comparison=[])
    assert console.verdict_line(report).partition(": ")[2] == told
