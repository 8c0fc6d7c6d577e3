"""`distbench sweep` as a user types it."""

from __future__ import annotations

import json
from pathlib import Path

from lxml import html

from distbench.cli.sweep import sweep_limits
from tests.cases import tiny_case
from tests.end_to_end.in_process import Run


def test_auto_limits_start_at_off_and_contain_bucket_edges_and_bounds() -> None:
    limits = sweep_limits(tiny_case(2, tokens=16), "auto")
    assert limits[:2] == ["off", "max-recv"]
    assert limits[2:6] == ["16", "32", "64", "128"]
    assert limits[-4:] == ["sum", "sum32", "pow2", "capacity"]
    assert sweep_limits(tiny_case(2), "7,max-recv-1") == ["off", "7", "max-recv-1"]


def test_sweep_prints_and_writes_one_row_per_limit(tmp_path: Path) -> None:
    case = (
        "--nproc",
        "2",
        "--model",
        "tiny",
        "--max-dispatch-tokens-per-rank",
        "64",
        "--iterations",
        "3",
        "--topk",
        "1",
    )
    run = Run(tmp_path / "out", "sweep", "--limits", "max-recv-1,max-recv,sum32", "--report", "html", *case)
    assert run.exit_code == 0
    rows = json.loads((run.out / "sweep.json").read_text())
    assert [row["limit"] for row in rows] == ["off", "max-recv-1", "max-recv", "sum32"]
    assert [row["safe"] for row in rows] == [True, False, True, True]
    assert [row["status"] for row in rows] == ["proven", "unsafe", "this batch", "proven"]
    assert "= 16+16 = 32" in run.stdout
    assert [row["verdict"] for row in rows[:2]] == ["PASS (emulated)", "UNDER_LIMIT (emulated)"]
    assert rows[1]["layer_us"] is None
    assert rows[2]["layer_us"] > 0
    assert "emulated: a check of the harness" in run.stdout
    page = html.parse(run.out / "results.html")
    (plot,) = page.xpath("//section[h2='Limits']//figure//svg")
    (shade,) = plot.xpath("path[@class='unsafe']/@d")
    edge = float(shade.split("H")[1].split("V")[0])
    places = sorted(float(path.split()[0][1:]) for path in plot.xpath("path[@class='dots']/@d"))
    assert len(places) == 2
    assert places[0] == edge  # max-recv is the first safe limit
    assert [title.text for title in plot.xpath("path[@class='lost']/title")] == ["limit max-recv-1: not run"]
    assert "Memory: not measured" in page.getroot().text_content()
