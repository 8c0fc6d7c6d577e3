"""The self-test as a user starts it: deadly faults restart the launch, and what slips through is exit code 1."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.launches import SOAK, Bench


def test_selftest(tmp_path: Path) -> None:
    chosen = () if SOAK else ("--clean=3", "--faults=death")
    table = tmp_path / "selftest.md"
    with Bench(tmp_path / "out", "selftest", "--quick", "--nproc=4", f"--markdown={table}", *chosen) as bench:
        assert bench.finish() == 0
    assert bench.stdout.splitlines()[-1] == "selftest: passed"
    text = table.read_text()
    assert "| late-death | 1 RANK_FAULT | 1 RANK_FAULT | rank fault in gather | 1/1 | 1/1 | 0 |" in text
    assert "0 false alarms" in text
    assert len(bench.verdicts) == len(bench.reports)
