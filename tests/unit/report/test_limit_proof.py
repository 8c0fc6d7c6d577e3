"""The proof of a limit: the bound holds for every routing and is attained, and every output states it."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lxml import etree

from distbench.case.entry import Entry
from distbench.case.limits import LimitProof, Traffic, prove_limit
from distbench.errors import Verdict
from distbench.launcher.campaign import Campaign, Rules
from distbench.report import console
from distbench.report.export import FILES, load_writers, parse_targets, write_reports
from distbench.report.export.markdown import escape
from distbench.report.journal import Journal, JournalReader
from distbench.report.limit import LimitReport
from distbench.report.progress import Progress
from distbench.report.results import Results
from distbench.report.schema import Report
from distbench.report.sweep import COLUMNS, sweep_row
from distbench.verify.records import NOT_PROVEN, Reason
from distbench.workload.routing import recv_counts, route
from distbench.workload.routing_spec import ExpertGroup, parse_routing
from tests.cases import tiny_case
from tests.reports import report_of
from tests.results import limit, result, write_results

TOKENS = (64, 0, 64, 1)
FORMULA = "sum of tokens over all ranks = 64+0+64+1 = 129"
STATUSES = {"proven": 9, "this batch": 6, "unsafe": 5}


def traffic(*total_recv: int, capacity: int = 4096) -> Traffic:
    return Traffic(tokens=TOKENS, total_recv=total_recv, capacity=capacity)


@pytest.mark.parametrize(
    ("rows", "status"),
    [
        (None, "proven"),
        (5000, "proven"),
        (129, "proven"),
        (128, "this batch"),
        (80, "this batch"),
        (79, "unsafe"),
        (1, "unsafe"),
    ],
)
def test_proof_status_follows_from_limit_batch_and_bound(rows: int | None, status: str) -> None:
    assert prove_limit(rows, traffic(80, 7, 0, 3)) == LimitProof(status=status, bound=129, formula=FORMULA)  # type: ignore[arg-type]


def test_proof_bound_is_the_receive_buffer_if_smaller_than_the_token_sum() -> None:
    proof = prove_limit(100, traffic(80, 7, 0, 3, capacity=100))
    assert (proof.status, proof.bound) == ("proven", 100)
    assert proof.formula == f"min({FORMULA}, capacity R = 100) = 100"


def test_batch_that_reaches_the_bound_makes_its_limit_proven() -> None:
    assert prove_limit(129, traffic(129, 0, 0, 0)).status == "proven"
    assert prove_limit(128, traffic(129, 0, 0, 0)).status == "unsafe"


def test_proof_formula_is_abbreviated_with_many_ranks() -> None:
    proof = prove_limit(1, Traffic(tokens=(*[7] * 63, 9), total_recv=(3,) * 64, capacity=4096))
    assert proof.formula == "sum of tokens over all ranks = 7+7+7+7+7+7+7+7+...+9 of 64 ranks = 450"
    assert prove_limit(1, Traffic((7,), (7,), 4096)).formula == "sum of tokens over all ranks = 7"


@given(data=st.data())
def test_routings_never_exceed_the_proven_bound_and_hot_rank_attains_it(data: st.DataObject) -> None:
    ranks, local = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 4))
    group = ExpertGroup(ranks, ranks * local, data.draw(st.integers(1, ranks * local)))
    tokens = tuple(data.draw(st.lists(st.integers(0, 9), min_size=ranks, max_size=ranks)))
    kind = data.draw(st.sampled_from(("uniform", "zipf:2", "duplicates")))
    for routing, reached in ((kind, False), (f"hot-rank:{ranks - 1}", True)):
        received = torch.zeros(ranks, dtype=torch.int64)
        for rank, count in enumerate(tokens):
            ids = route(
                parse_routing(routing),
                group,
                seed=data.draw(st.integers(0, 99)),
                ranks=torch.full((count,), rank),
                tokens=torch.arange(count),
            )
            received += recv_counts(ids, local, ranks)
        bound = prove_limit(1, Traffic(tokens, tuple(received.tolist()), 1 << 20)).bound
        assert int(received.max()) <= bound
        assert not reached or int(received[-1]) == bound


def limit_of(status: str) -> LimitReport:
    return msgspec.convert(limit(STATUSES[status], status), LimitReport)


def report(status: str) -> Report:
    """Report of a case whose limit has this status, judged as in a run."""
    made = report_of(tiny_case(2, limit=str(STATUSES[status])), "x" if status == "unsafe" else "", Verdict.UNDER_LIMIT)
    notes = [Reason(code=NOT_PROVEN, message="not proven for other routings: …")] if status == "this batch" else []
    return msgspec.structs.replace(made, limit=limit_of(status), reasons=notes)


@pytest.mark.parametrize("status", STATUSES)
def test_console_states_the_proof_in_header_and_verdict(status: str, capsys: pytest.CaptureFixture[str]) -> None:
    console.print_report(report(status))
    text = " ".join(capsys.readouterr().out.split())
    word = "this batch only" if status == "this batch" else status
    assert f"{word}: the fullest rank receives 6, any routing of these token counts at most 9 (sum of tokens" in text
    assert "over all ranks = 5+4 = 9)" in text
    assert text.endswith("; not proven for other routings") == (status == "this batch")


@pytest.mark.parametrize("status", STATUSES)
def test_sweep_states_the_proof_in_its_column_and_file(status: str) -> None:
    row = sweep_row(report(status))
    assert row.cells()[COLUMNS.index("safe")] == status
    assert json.loads(msgspec.json.encode(row))["proof"] == limit()["proof"] | {"status": status}
    old = sweep_row(
        msgspec.structs.replace(report(status), limit=msgspec.structs.replace(limit_of(status), proof=None))
    )
    assert old.cells()[COLUMNS.index("safe")] == ("unsafe" if status == "unsafe" else "this batch")


@pytest.mark.parametrize("status", STATUSES)
def test_journal_and_summary_state_the_proof(status: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = report(status)
    journal = Journal(tmp_path)
    journal.append(made)
    journal.close()
    (line,) = JournalReader(tmp_path).new_lines()
    assert line.limit == made.limit
    entry = Entry(name=made.name, case=tiny_case(2, limit=str(STATUSES[status])), sources={})
    summary = Campaign([entry], tmp_path, Rules(), Progress(1, quiet=True)).conclude(None)
    assert summary.limits == {status: 1}
    assert json.loads((tmp_path / "summary.json").read_text())["limits"] == {status: 1}
    console.print_summary(summary, str(tmp_path))
    assert f"limits by case: 1 {status} (" in capsys.readouterr().out


@pytest.fixture
def written(tmp_path: Path) -> dict[str, str]:
    """Every format of a suite with a limit of each status."""
    made = [result(status, limit=limit(rows, status)) for status, rows in STATUSES.items()]
    results = Results(write_results(tmp_path, [*made, result("refused", limit=None)]))
    targets = parse_targets(",".join(FILES), tmp_path)
    write_reports(results, load_writers(targets))
    return {name: path.read_text() for name, path in targets.items()}


def test_junit_states_the_proof_of_every_case(written: dict[str, str]) -> None:
    root = etree.fromstring(written["junit"].encode())
    told = {case.get("name"): case.findtext("system-out") or "" for case in root.iter("testcase")}
    for status in STATUSES:
        assert str(limit_of(status)) in told[status]
    assert "limit" not in told["refused"]


def test_csv_states_the_proof_of_every_case(written: dict[str, str]) -> None:
    rows = {row["name"]: row for row in csv.DictReader(written["csv"].splitlines())}
    proofs = {name: (row["limit_proof"], row["limit_bound"], row["limit_formula"]) for name, row in rows.items()}
    assert proofs == {status: (status, "9", "sum of tokens over all ranks = 5+4 = 9") for status in STATUSES} | {
        "refused": ("", "", "")
    }


def test_markdown_counts_proofs_and_states_that_of_a_failure(written: dict[str, str], tmp_path: Path) -> None:
    for status in STATUSES:
        assert f"| {status} | 1 | " in written["md"]
    write_results(tmp_path, [result("short", "UNDER_LIMIT", limit=limit(5, "unsafe"))])
    targets = parse_targets("md", tmp_path)
    write_reports(Results(tmp_path), load_writers(targets))
    assert escape("unsafe: the fullest rank receives 6, any routing") in targets["md"].read_text()


def test_prometheus_counts_proofs(written: dict[str, str]) -> None:
    for status in STATUSES:
        assert f'distbench_cases_by_limit{{case="",proof="{status}",suite="distbench"}} 1.0' in written["prom"]


def test_json_holds_the_proof_as_the_report_does(written: dict[str, str]) -> None:
    document: dict[str, Any] = json.loads(written["json"])
    assert [one["limit"]["proof"]["status"] for one in document["results"][:3]] == list(STATUSES)
