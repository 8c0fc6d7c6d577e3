"""The self-test as a user starts it: deadly faults restart the launch, and a missed fault gives exit code 1.

All faults once, the deadly ones too; DISTBENCH_SOAK=1 adds the fifty clean cases of --quick, and one wrong token in a
million.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.end_to_end.in_process import Run
from tests.end_to_end.launches import SOAK

HANG = "| hang:stage={stage} | 1 HANG | 1 HANG | hang in {stage} | 1/1 | 1/1 | 0 |"
DEATH = "| {fault} | 1 RANK_FAULT | 1 RANK_FAULT | rank fault in {stage} | 1/1 | 1/1 | 0 |"


@pytest.mark.timeout(600)
def test_selftest_catches_every_fault_with_its_stage_and_rank(tmp_path: Path) -> None:
    chosen = () if SOAK else ("--clean=5",)
    table = tmp_path / "selftest.md"
    run = Run(tmp_path / "out", "selftest", "--quick", "--nproc=4", f"--markdown={table}", *chosen)
    assert run.exit_code == 0
    assert run.stdout.splitlines()[-1] == "selftest: passed"
    ran = "4 ranks, collective + reference (emulated: collective for mori, reference for aiter)"
    assert run.stdout.startswith(f"self-test of {ran}\n")
    text = table.read_text()
    assert f"Ran on {ran}." in text
    for stage in ("dispatch", "combine"):
        assert HANG.format(stage=stage) in text
    for fault, stage in (
        ("late-death", "gather"),
        ("death", "combine"),
        ("dies-at-304-336:limit=304", "experts"),
        ("dies-at-304-336:limit=336", "experts"),
    ):
        assert DEATH.format(fault=fault, stage=stage) in text
    assert "0 false alarms" in text
    assert len(run.verdicts) == len(run.reports)


def test_selftest_counts_guards_of_adapters_that_end_a_rank_as_right(tmp_path: Path) -> None:
    table = tmp_path / "selftest.md"
    parts = ("--transport=mori", "--experts=aiter", "--emulate")
    faults = "--faults=dispatched-ids,weights-not-cut,capacity-ignored,scales"
    command = ("selftest", "--quick", "--nproc=4", "--clean=5", faults, f"--markdown={table}", *parts)
    run = Run(tmp_path / "out", *command)
    assert run.exit_code == 0
    text = table.read_text()
    emulated = "distbench.transport.mori.emulated for mori, distbench.experts.aiter.emulated for aiter"
    assert f"Ran on 4 ranks, mori + aiter (emulated: {emulated})." in text
    assert "--transport=mori --experts=aiter --emulate=True --faults=dispatched-ids" in text
    assert DEATH.format(fault="dispatched-ids", stage="combine") in text
    assert DEATH.format(fault="weights-not-cut", stage="experts") in text
    assert "| capacity-ignored | " in text
    assert "| scales-not-cut | 1 CORRUPT | 1 CORRUPT | truncate: poison or NaN | 1/1 | 1/1 | 0 |" in text
    assert {report["case"]["transport"] for report in run.reports} == {"mori"}
    journal = tmp_path / "out" / "results.jsonl"
    *most, _ = lines = journal.read_text().splitlines(keepends=True)
    journal.write_text("".join(most))
    resumed = Run(tmp_path / "out", *command, "--resume")
    assert resumed.exit_code == 0
    assert journal.read_text().startswith("".join(most))
    assert len(resumed.reports) == len(lines)


@pytest.mark.parametrize("faults", ["zzz", "death,zzz"])
def test_unknown_selftest_fault_is_refused_with_the_known_ones(faults: str, tmp_path: Path) -> None:
    run = Run(tmp_path / "out", "selftest", "--faults", faults, "--clean", "0")
    assert run.exit_code == 2
    *_, line = run.stderr.splitlines()
    assert line.startswith("distbench: INVALID: --faults 'zzz': in no fault's name; allowed are parts of short-limit, ")
    assert ", death, late-death, " in line


@pytest.mark.skipif(not SOAK, reason="minutes: set DISTBENCH_SOAK=1")
@pytest.mark.timeout(600)
def test_one_wrong_token_in_a_million_is_found_and_its_rate_is_in_the_interval(tmp_path: Path) -> None:
    shape = {
        "hidden-size": 64,
        "intermediate-size": 32,
        "topk": 1,
        "tokens": 1024,
        "max-dispatch-tokens-per-rank": 1024,
    }
    flags = [f"--{key}={value}" for key, value in shape.items()]
    inject = "--inject=corrupt-tokens:rank=all,rate=1e-6"
    run = Run(tmp_path / "out", "run", "--nproc=4", "--model=tiny", *flags, "--repeats=330", inject)
    assert run.exit_code == 1
    rate = run.report["rate"]
    assert rate["tokens"] > 4_000_000
    assert rate["wrong_tokens"] >= 1
    assert rate["low_per_million"] <= 1 <= rate["high_per_million"]
