"""Twelve broken transports and twelve broken experts, each in a real launch: named by verdict, rule, stage and rank.

A suite goes on behind a rank that is lost or stands still, so two suites run all 24. The rules of the contract are held
in tests/unit/transport/test_contract.py and tests/unit/experts/test_contract.py as well.
"""

from __future__ import annotations

import json
from itertools import zip_longest
from pathlib import Path
from typing import Any

import pytest

from tests.broken_parts import NAMED
from tests.end_to_end.launches import ROOT, SOAK, TINY, Bench

LIMIT_S = 2


def chosen(part: str) -> list[str]:
    """Bugs that end a rank lie between others, since a suite ends after three lost launches in a row."""
    bugs = [bug for kind, bug in NAMED if kind == part]
    wrong = [bug for bug in bugs if NAMED[part, bug].verdict == "BASELINE_WRONG"]
    ending = [bug for bug in bugs if bug not in wrong]
    pairs = zip_longest(ending, wrong)
    return [bug for pair in pairs for bug in pair if bug is not None]


@pytest.mark.skipif(not SOAK, reason="long: set DISTBENCH_SOAK=1")
@pytest.mark.parametrize("part", ["transport", "experts"])
def test_each_broken_part_is_named_and_holds_the_launch_no_longer_than_its_limit(part: str, tmp_path: Path) -> None:
    suite = {
        "defaults": {**TINY, "tokens": 5, "device": "cpu", "numerics": "exact", "timeout": LIMIT_S},
        "axes": {f"{part}_option": [f"bug={bug}" for bug in chosen(part)]},
    }
    (tmp_path / "broken.json").write_text(json.dumps(suite))
    plugin = f"tests.broken_parts:{part.upper()}"
    arguments = ("suite", tmp_path / "broken.json", "-n", "2", f"--{part}", plugin)
    with Bench(tmp_path / "out", *arguments, PYTHONPATH=str(ROOT)) as bench:
        assert bench.finish() in (1, 3)
    lines = [json.loads(line) for line in (tmp_path / "out" / "results.jsonl").read_text().splitlines()]
    found = {line["case"][f"{part}_option"].removeprefix("bug="): line for line in lines if "case" in line}
    assert sorted(found) == sorted(chosen(part))
    for bug, report in found.items():
        assert told(report) == list(NAMED[part, bug]), (bug, report["reasons"], report["first_divergence"])


def told(report: dict[str, Any]) -> list[Any]:
    """Verdict, rule, stage and rank as a report names them."""
    divergence = report["first_divergence"]
    if divergence:
        return [report["verdict"], "", divergence["stage"], divergence["rank"]]
    (reason,) = report["reasons"]
    message = reason["message"]
    rule = message.split(" breaks ")[-1].split(" break ")[-1].split(":")[0].split(";")[0].split()[0]
    return [report["verdict"], rule, reason["stage"], reason["rank"]]
