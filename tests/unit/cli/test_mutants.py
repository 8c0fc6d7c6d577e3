"""Results of mutant runs: outcomes, detection rates, false alarms and the exit code."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import pytest

from distbench.cli.main import main
from distbench.errors import InvalidCase, Verdict
from distbench.faults.mutants import CORPUS
from distbench.faults.mutants.fault import unfit
from distbench.faults.mutants.rules import RULES
from distbench.launcher.preflight import check_case
from distbench.report.schema import InjectedReport
from distbench.tools.mutants.outcomes import Found, found_in
from distbench.tools.mutants.plan import MutantPlan, plan
from distbench.tools.mutants.table import cells, closing_lines, markdown, rules_table
from tests.cases import tiny_case
from tests.reports import report_of

NAMES = ["gelu-for-silu", "relu-in-column-0", "silu-by-exp2"]
ROOT = Path(__file__).parents[3]


def found(out: Path, verdicts: dict[str, Verdict], asked: MutantPlan, without: str = "", share: float = 0.97) -> Found:
    """Findings where a run ends in the verdict of the first key of `verdicts` that its name contains, else PASS."""
    with (out / "results.jsonl").open("wb") as lines:
        for run in asked.runs:
            name = run.entry.name
            verdict = next((verdict for text, verdict in verdicts.items() if text in name), Verdict.PASS)
            report = report_of(run.entry.case, "" if verdict is Verdict.PASS else "made up", verdict, name)
            accepted = {rule: rule == "cosine" for rule in RULES} if run.arm == "truncated" else {}
            injected = [InjectedReport(name="mutant", options={}, hits={"0": 1}, accepted=accepted)]
            report = msgspec.structs.replace(report, injected=injected if run.mutant else [])
            if not without or without not in name:
                lines.write(msgspec.json.encode(report) + b"\n")
    return found_in(out, asked, 2, 2, share)


def test_mutant_detected_by_one_kind_of_inputs_in_every_run_counts_as_detected(tmp_path: Path) -> None:
    asked = plan(2, 2, NAMES)
    seen = {
        "gelu-for-silu bf16 all gaussian": Verdict.BASELINE_WRONG,
        "gelu-for-silu bf16 truncated exact": Verdict.CORRUPT,
        "gelu-for-silu fp8 all exact": Verdict.RANK_FAULT,
        "gelu-for-silu fp8 truncated gaussian": Verdict.CORRUPT,
        "relu-in-column-0 bf16 all exact": Verdict.BASELINE_WRONG,
        "relu-in-column-0 bf16 truncated exact": Verdict.NONDETERMINISTIC,
    }
    result = found(tmp_path, seen, asked, share=0.5)
    first, second, harmless = result.mutants
    assert (first.exact, first.gaussian, first.either) == ("sometimes", "sometimes", "always")
    assert (second.exact, second.gaussian, second.either) == ("sometimes", "never", "sometimes")
    assert second.missed[0] == "bf16, truncated, seed 0"
    assert harmless.equivalent
    assert [one.name for one in result.unseen] == ["relu-in-column-0"]
    assert (result.seen_share, result.passed) == (0.5, True)
    assert [len(result.rejected_by(rule)) for rule in ("vllm", "cosine")] == [2, 0]
    assert "vllm rejects 2 of 2" in closing_lines(result)
    assert cells(result)[0][:6] == ("activation", "2", "1", "0 / 2 / 0", "0 / 1 / 1", "1 / 1 / 0")


def test_low_detection_rate_false_alarm_or_missing_result_fails(tmp_path: Path) -> None:
    asked = plan(2, 1, NAMES)
    all_seen = dict.fromkeys(NAMES[:2], Verdict.CORRUPT)
    assert found(tmp_path, all_seen, asked).passed
    assert not found(tmp_path, {NAMES[0]: Verdict.CORRUPT}, asked).passed
    assert not found(tmp_path, {**all_seen, "silu-by-exp2 fp8 truncated": Verdict.CORRUPT}, asked).passed
    alarmed = found(tmp_path, {**all_seen, "clean fp8": Verdict.BASELINE_WRONG}, asked)
    assert (alarmed.passed, len(alarmed.alarms)) == (False, 2)
    assert closing_lines(alarmed)[0].startswith("false alarm: BASELINE_WRONG: clean fp8")
    lost = found(tmp_path, all_seen, asked, without="clean bf16 exact")
    assert (lost.passed, lost.missing) == (False, ["clean bf16 exact #0"])


def test_nondeterminism_of_an_atomic_kernel_is_no_false_alarm(tmp_path: Path) -> None:
    asked = plan(2, 1, NAMES)
    varying = {"clean": Verdict.NONDETERMINISTIC, "silu-by-exp2": Verdict.DRIFT}
    assert found(tmp_path, {**varying, "silu": Verdict.CORRUPT, "relu": Verdict.CORRUPT}, asked).passed


def test_markdown_tables_list_every_mutant_and_every_rule(tmp_path: Path) -> None:
    text = markdown(found(tmp_path, {}, plan(2, 1, NAMES)), "distbench mutants")
    for name in NAMES:
        assert f"| {name} " in text
    docs = (ROOT / "docs/mutants.md").read_text()
    assert rules_table() in docs


def test_mutants_inside_the_reference_experts_are_unfit_for_other_parts() -> None:
    assert "reference experts" in unfit(CORPUS["gelu-for-silu"], "triton", "collective", "cuda")
    assert "collective transport" in unfit(CORPUS["sum-truncated"], "reference", "mori", "cpu")
    assert "on the CPU" in unfit(CORPUS["two-rows-added-in-float64"], "triton", "collective", "cuda")
    assert unfit(CORPUS["next-expert"], "triton", "mori", "cuda") == ""


def test_unknown_mutant_or_class_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutants", "--only", "nonsense"]) == 2
    assert "classes are activation, K coverage" in capsys.readouterr().err
    with pytest.raises(InvalidCase, match="no such mutant"):
        check_case(tiny_case(2, inject="mutant:name=nonsense"))


def test_list_option_prints_each_mutant_with_its_class(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutants", "--list", "--only", "cut"]) == 0
    assert "window-shifted" in capsys.readouterr().out


def test_mutants_command_prints_the_table_and_writes_its_findings(tmp_path: Path) -> None:
    result, docs = tmp_path / "found.json", tmp_path / "mutants.md"
    docs.write_text("# Mutants\n\nmine\n")
    arguments = ["--seeds=1", f"--json={result}", f"--write-docs={docs}", f"--out={tmp_path / 'out'}"]
    assert main(["mutants", "--only=window-shifted,next-expert,cut-is-a-copy", *arguments]) == 0
    said = json.loads(result.read_text())
    assert {one["name"]: one["either"] for one in said["mutants"]} == {
        "next-expert": "always",
        "window-shifted": "always",
        "cut-is-a-copy": "never",
    }
    assert said["alarms"] == []
    assert docs.read_text().startswith("# Mutants\n\nmine\n")
    assert "| next-expert | ids | asked |" in docs.read_text()


@pytest.mark.parametrize("text", ["abc", "nan", "inf", "0", "-1", "1.1", ""])
def test_share_that_no_run_or_every_run_would_reach_is_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["mutants", f"--share={text}"]) == 2
    assert f"{text!r} is refused; allowed are shares above 0, up to 1" in capsys.readouterr().err
