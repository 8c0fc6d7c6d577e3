"""The page of a comparison: what became worse, old beside new with intervals, and nothing that runs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lxml import html

from distbench.cli.main import main
from distbench.tools.compare.reports.page import percent
from tests.pages import HOSTILE, MIB, hostile, read_page, words
from tests.results import result, timing, write_results


def noisy(seed: int, scale: float = 1.0, size: int = 30) -> dict[str, Any]:
    """Times with noise; those of the truncated experts are `scale` times longer."""
    draw = np.random.default_rng(seed).normal(0, 0.03, size)
    made = timing(1.0, (100 * np.exp(draw)).tolist())
    made["truncated"] = made["truncated"] | {
        "experts": timing(scale, (100 * np.exp(draw)).tolist())["padded"]["experts"]
    }
    return made | {"wall_s": 0.25}


def page_of(
    tmp_path: Path, old: list[list[dict[str, Any]]], new: list[dict[str, Any]], *more: str
) -> tuple[int, html.HtmlElement]:
    folders = [str(write_results(tmp_path / f"old{number}", reports)) for number, reports in enumerate(old)]
    page = tmp_path / "compare.html"
    code = main(["compare", *folders, str(write_results(tmp_path / "new", new)), "--report", f"html={page}", *more])
    return code, read_page(page)


def test_page_is_written_into_the_folder_of_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("old", "new"):
        write_results(tmp_path / name, [result(timing=noisy(1))])
    assert main(["compare", "old", "new", "--report", "html"]) == 0
    assert "No regression" in words(read_page(tmp_path / "distbench-out" / "compare" / "results.html"), "//h1")
    assert "distbench-out/compare/results.html" in capsys.readouterr().err


def test_page_on_standard_output_is_refused_without_a_command_that_writes_other_pages(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compare", "old", "new", "--report", "html=-"]) == 2
    told = capsys.readouterr().err
    assert "report -: standard output has the command's own text; name a file" in told
    assert "distbench report" not in told


def test_other_formats_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(write_results(tmp_path, [result()]))
    assert main(["compare", folder, folder, "--report", "csv"]) == 2
    assert "report csv: this command does not write it; allowed are html" in capsys.readouterr().err


def test_slower_stage_is_named_with_its_interval(tmp_path: Path) -> None:
    code, root = page_of(tmp_path, [[result(timing=noisy(1))]], [result(timing=noisy(2, 1.3))])
    assert (code, words(root, "//h1")) == (1, "✗ Regression")
    assert "1 arm and stage slower" in words(root, "//header")
    (alarm,) = root.xpath("//tr[@class='alarm']")
    assert [cell.text for cell in alarm][:1] == ["truncated, experts"]
    assert "slower" in words(alarm, ".")
    low, high = re.findall(r"[+-][\d.]+", alarm.xpath("td")[3].text.partition("(")[2])
    assert 20 < float(low) < 30 < float(high) < 40
    assert root.xpath("//*[local-name()='path'][@class='bar worse']")
    assert "experts: " in words(root, "//figure[figcaption='truncated']")


def test_cases_are_listed_the_worst_first_with_both_verdicts(tmp_path: Path) -> None:
    old = [result("fixed", "CORRUPT"), result("gone"), result("worse")]
    code, root = page_of(tmp_path, [old], [result("fixed"), result("worse", "HANG")], "--verdicts-only")
    assert code == 1
    rows = [[" ".join(cell.text_content().split()) for cell in row] for row in root.xpath("//section[1]//tbody/tr")]
    assert [row[:4] for row in rows] == [
        ["regressed", "worse", "✓ PASS", "H HANG"],
        ["absent", "gone", "✓ PASS", "none"],
        ["fixed", "fixed", "C CORRUPT", "✓ PASS"],
    ]
    assert "The same on both sides." in words(root)


def test_comparison_without_times_is_not_shown_as_a_pass(tmp_path: Path) -> None:
    code, root = page_of(tmp_path, [[result(timing={"wall_s": 1.0})]], [result(timing={"wall_s": 1.0})])
    assert code == 77
    assert root.xpath("//header/@class") == ["verdict expected"]
    assert "not everything could be judged" in words(root, "//h1")
    assert "no times compared" in words(root)
    assert not root.xpath("//figure")


def test_distance_of_several_old_launches_is_in_the_figures(tmp_path: Path) -> None:
    code, root = page_of(tmp_path, [[result(timing=noisy(seed))] for seed in range(3)], [result(timing=noisy(9))])
    assert code in (0, 77)
    assert "3 older launches" in words(root, "//header")
    assert re.fullmatch(r"[\d.]+ %", root.xpath("//table[@class='names']/tbody/tr[1]/td[7]")[0].text)


def test_hostile_text_stays_text_and_long_lists_are_cut(tmp_path: Path) -> None:
    environment = {"hosts": [HOSTILE], "devices": [], "versions": {HOSTILE: HOSTILE}, "commits": {}, "variables": {}}
    old = [hostile(result(str(number), timing=timing())) for number in range(300)]
    new = [hostile(result(str(number), "CORRUPT", environment=environment)) for number in range(300)]
    times = {HOSTILE: {HOSTILE: timing(1.0, range(90, 120))["padded"]["experts"]}, "wall_s": 1.0}
    for number, (before, after) in enumerate(zip(old, new, strict=True)):
        before["case"] = after["case"] = {"hash": str(number)}
        before["timing"] = after["timing"] = times
        after["verdict"] = "PASS" if number < 9 else "CORRUPT"
        after["as_expected"] = number < 9
    _, root = page_of(tmp_path, [old], new)
    assert "<script>alert(1)</script>" in words(root)
    assert "and 91 more" in words(root)
    assert (tmp_path / "compare.html").stat().st_size < MIB


@pytest.mark.parametrize(
    ("share", "text"), [(0.0, "+0.0 %"), (-0.123, "-12.3 %"), (1.2345, "+123 %"), (25, "+2.5e+03 %")]
)
def test_share_as_a_percentage(share: float, text: str) -> None:
    assert percent(share) == text
