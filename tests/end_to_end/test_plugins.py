"""Plugins from the command line: a combine that stands still is named by rank and rule within its limit."""

from __future__ import annotations

from pathlib import Path

from tests.end_to_end.launches import ROOT, Bench


def test_plugin_that_stands_still_is_named_by_rank_and_rule_within_its_limit(tmp_path: Path) -> None:
    arguments = ("run", "-n", "2", "--model", "tiny", "--device", "cpu", "--max-dispatch-tokens-per-rank", "64")
    name = "tests.brought_plugins:STANDS"
    limits = ("--stage-timeouts", "combine=0.5", "--transport", name, "--transport-option", "factor=3")
    with Bench(tmp_path / "out", *arguments, *limits, PYTHONPATH=str(ROOT)) as run:
        assert run.finish() == 3
    assert run.report["verdict"] == "HANG"
    assert run.report["plugins"] == [f"transport {name}"]
    assert run.report["case"]["transport_option"] == "factor=3"
    (reason,) = run.report["reasons"]
    assert reason["rank"] == 1
    assert "rank 1 stood in padded/combine for" in reason["message"]
    assert f"; transport {name} breaks combine.returns; rank 0 waited for it" in reason["message"]
