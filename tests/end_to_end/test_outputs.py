"""Report formats and baselines of real runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

from lxml import etree

from distbench.report.export import FILES
from tests.end_to_end.in_process import Run
from tests.end_to_end.launches import write_suite


def test_suite_writes_every_report_format_and_matches_itself_as_baseline(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(2), repeats=12)
    common = ("suite", suite, "--nproc", "2")
    run = Run(tmp_path / "old", *common, "--quiet", "--report", ",".join(FILES))
    assert run.exit_code == 0
    document = json.loads((run.out / "results.json").read_text())
    assert document["results"] == run.reports
    samples = run.reports[0]["timing"]["truncated"]["experts"]["samples_us"]
    assert len(samples) == 12
    assert max(samples) == run.reports[0]["timing"]["truncated"]["experts"]["max_over_ranks_us"]
    root = etree.fromstring((run.out / "junit.xml").read_bytes())
    assert [case.get("name") for case in root.iter("testcase")] == ["seed=0", "seed=1"]
    assert "emulated" in (run.out / "results.md").read_text()
    run = Run(tmp_path / "new", *common, "--select", "seed=1", "--baseline", tmp_path / "old")
    code = run.exit_code
    judged = [line for line in run.stdout.splitlines() if "truncated/experts, all cases: " in line]
    assert len(judged) == 1
    assert code in {0, 1, 77}  # what a busy machine's noise allows
    assert re.search(rf"^exit {code}, .* worse: 1 case compared|^exit 77, .* judged: 1 ", run.stdout, re.MULTILINE)
    assert "exit 0, as expected: results in" in run.stdout
    worse = [report | {"case": report["case"] | {"seed": 9}} for report in json.loads(json.dumps(document["results"]))]
    (tmp_path / "changed.jsonl").write_text("".join(json.dumps(report) + "\n" for report in worse))
    again = ("--baseline", tmp_path / "changed.jsonl", "--verdicts-only")
    run = Run(tmp_path / "old", *common, *again)
    assert run.exit_code == 1
    assert "another case   seed=0: PASS → PASS: not the same seed" in run.stdout


def test_unreadable_baseline_is_refused_before_a_rank_starts(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text("{}\n")
    run = Run(tmp_path / "out", "run", "--model", "tiny", "--baseline", tmp_path / "broken.jsonl")
    assert run.exit_code == 2
    assert "broken.jsonl, line 1" in run.stderr
    assert not (run.out / "ranks").exists()
