"""Pages of HTML: what they say, that nothing in a report runs or loads, and how large they become."""

from __future__ import annotations

import json
import re
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from lxml import etree, html

from distbench.cli.main import main
from distbench.report.html.suite_page import cell_of, grid_of
from distbench.report.results import Results
from tests.pages import HOSTILE, MIB, OLD, case, failing, hostile, many_cases, ranks_1024, read_page, words
from tests.results import result, write_results


def page_of(folder: Path, reports: list[dict[str, Any]], cases: int | None = None) -> html.HtmlElement:
    """The page of these results, proved to be closed: nothing in it runs, and nothing is loaded."""
    write_results(folder, reports, cases)
    main(["report", str(folder), "--report", "html"])
    return read_page(folder / "results.html")


def test_page_of_a_case_begins_with_its_verdict_in_words(tmp_path: Path) -> None:
    root = page_of(tmp_path, [failing()])
    (heading,) = root.xpath("//h1")
    assert heading.text_content().split()[:2] == ["U", "UNDER_LIMIT"]
    assert "the limit cuts off received rows" in heading.text_content()
    assert root.xpath("//main/header")[0].getprevious() is None
    assert failing()["reasons"][0]["message"] in words(root)


def test_flow_marks_the_first_wrong_stage_and_nothing_after_it_as_right(tmp_path: Path) -> None:
    root = page_of(tmp_path, [failing()])
    steps = [(one.get("class"), one.xpath("strong")[0].text) for one in root.xpath("//ol/li")]
    assert steps == [("right", "dispatch"), ("wrong", "truncate"), ("later", "experts"), ("later", "combine")]
    assert "first wrong stage: rank" in words(root, "//ol/li[@class='wrong']")


def test_stage_in_which_a_rank_stood_is_marked_where_no_rank_reported(tmp_path: Path) -> None:
    reason = {"code": "hang", "message": "rank 1 stood still", "stage": "experts"}
    report = result("hung", "HANG", reasons=[reason], ranks=[], suite="distbench run")
    steps = [one.get("class") for one in page_of(tmp_path, [report]).xpath("//ol/li")]
    assert steps == ["unknown", "unknown", "stopped", "unknown"]


def test_rows_sent_are_a_table_with_numbers_up_to_16_ranks_and_a_picture_above(tmp_path: Path) -> None:
    small = page_of(tmp_path / "small", [failing()])
    assert [one.text for one in small.xpath("//table[@class='heat']//td")] == ["0", "1", "10", "11"]
    wide = {"ranks_per_block": 8, "rows": [[row * column for column in range(17)] for row in range(17)]}
    large = page_of(tmp_path / "large", [failing(sent=wide)])
    assert not large.xpath("//table[@class='heat']")
    assert "one cell for 8 by 8 ranks together" in words(large, "//figcaption")
    assert "1 256 rows" in re.sub(r"\s+", " ", words(large, "//p[@class='legend']"))


def test_rank_above_the_limit_is_named_beside_the_picture(tmp_path: Path) -> None:
    report = failing()
    above = [rank["rank"] for rank in report["ranks"] if rank["total_recv"] > report["limit"]["effective"]]
    caption = words(page_of(tmp_path, [report]), "//figcaption[contains(., 'received')]")
    assert above == [0, 1]
    assert caption.endswith("rank 0-1")


def test_page_of_a_case_has_its_caller_and_the_arguments_that_differ(tmp_path: Path) -> None:
    caller = {
        "package": "sglang",
        "version": "0.5.23",
        "origin": "sglang.whl",
        "files": ["srt/a.py"],
        "sha256": "5a" * 32,
        "rows": {"0": 32},
        "arguments": {"block_size_M": ["64", "none"]},
    }
    root = page_of(tmp_path, [failing(caller=caller)])
    said = {one.text: one.getnext().text for one in root.xpath("//dl/dt")}
    assert said["caller"] == f"sglang 0.5.23, sglang.whl, SHA-256 {'5a' * 32}"
    assert said["caller's argument block_size_M"] == "64, distbench's none"


@pytest.mark.parametrize("name", ["pass", "under-limit", "nondeterministic"])
def test_report_from_before_rows_sent_has_its_page(name: str, tmp_path: Path) -> None:
    report = json.loads((OLD / "reports" / f"{name}.json").read_text())
    assert "sent" not in report
    text = words(page_of(tmp_path, [report | {"suite": "distbench run"}]))
    assert report["verdict"] in text
    assert "Rows sent" not in text


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", ["pass", "under-limit", "nondeterministic"])
def test_hostile_text_in_every_field_stays_text(tmp_path: Path, name: str, count: int) -> None:
    clean = json.loads((OLD / "reports" / f"{name}.json").read_text()) | {"stacks": {"0": "line"}, "tags": ["t"]}
    made = [hostile(clean | {"suite": "distbench run"}) for _ in range(count)]
    for number, one in enumerate(made):
        one["case"]["hash"] = str(number)
        one["suite"] = "distbench run" if count == 1 else HOSTILE
        one["timing"] = {HOSTILE: {HOSTILE: {"median_us": 1.0, "samples_us": [1.0]}}, "wall_s": 1.0}
    text = words(page_of(tmp_path, made))
    assert "<script>alert(1)</script><svg onload=x><img src=http://x.test/ onerror=x>javascript:x {{ 7*7 }}" in text
    assert "\\x1b[31m\\u202e" in text
    raw = (tmp_path / "results.html").read_text(encoding="utf-8")
    assert not set(raw) & {"\x1b", "\u202e"}
    assert "<script" not in raw


def test_long_names_of_many_cases_do_not_make_a_large_page(tmp_path: Path) -> None:
    made = [result("n" * 9000, "CORRUPT", **case(number)) for number in range(300)]
    page_of(tmp_path, made)
    assert (tmp_path / "results.html").stat().st_size <= 5 * MIB


def test_long_text_is_cut_and_says_so(tmp_path: Path) -> None:
    report = failing(reasons=[{"code": "c", "message": "m" * 100_000}])
    page_of(tmp_path, [report])
    assert (tmp_path / "results.html").stat().st_size < 100_000
    assert "(96000 characters more)" in (tmp_path / "results.html").read_text()


def test_results_of_other_types_are_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for changes in ({"comparison": 3}, {"timing": {"padded": {"experts": {"median_us": "x"}}, "wall_s": 1.0}}):
        write_results(tmp_path, [failing(**changes)])
        assert main(["report", str(tmp_path), "--report", "html"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "results.html").exists()


def test_grid_has_a_sign_for_each_case_by_the_keys_in_which_cases_differ(tmp_path: Path) -> None:
    made = [
        result(
            f"{routing} {rows}",
            "CORRUPT" if (routing, rows) == ("hot", 3) else "PASS",
            **case(10 * rows + len(routing), routing=routing, limit=str(rows), width=rows * 7),
        )
        for rows in range(4)
        for routing in ("uniform", "hot")
    ]
    root = page_of(tmp_path, made)
    assert [one.text for one in root.xpath("//table[@class='grid']/thead//th")] == [
        "limit",
        "routing uniform",
        "routing hot",
    ]
    assert [one.text for one in root.xpath("//table[@class='grid']/tbody//th")] == ["0", "1", "2", "3"]
    signs = [one.text_content() for one in root.xpath("//table[@class='grid']//td")]
    assert signs == [*["✓"] * 7, "C!"]
    assert "7 of 8 cases ended as expected" in words(root, "//h1")
    (bad,) = root.xpath("//table[@class='grid']//a[contains(@class, 'bad')]/@href")
    assert "CORRUPT" in words(root, f"//*[@id='{bad[1:]}']//h2")


def test_verdict_expected_by_the_suite_is_neither_good_nor_bad(tmp_path: Path) -> None:
    meant = result("cut", "UNDER_LIMIT", as_expected=True, expect="by-limit", **case(1))
    root = page_of(tmp_path, [meant, result("fine", **case(2))])
    assert [one.get("class") for one in root.xpath("//table[@class='grid']//a")] == ["mark expected", "mark good"]


def test_cases_without_a_result_are_counted_in_the_headline(tmp_path: Path) -> None:
    assert "1 of 3 cases ended as expected; 2 have no result; exit code 3" in words(
        page_of(tmp_path, [result(**case(1))], 3)
    )


@pytest.mark.parametrize("count", [500, 5000])
def test_page_of_many_cases_is_small_and_has_details_of_failing_ones(tmp_path: Path, count: int) -> None:
    made = many_cases(count)
    start = time.process_time()
    root = page_of(tmp_path, made)
    assert time.process_time() - start < 20
    assert (tmp_path / "results.html").stat().st_size <= 5 * MIB
    assert len(root.xpath("//table[@class='grid']//*[contains(@class, 'mark')]")) == count
    detailed = min(count // 10, 200)
    assert len(root.xpath("//article")) == detailed
    assert (f"{count // 10 - detailed} further cases have no details" in words(root)) is (count // 10 > detailed)


def test_page_of_1024_ranks_is_small_even_where_all_fail(tmp_path: Path) -> None:
    wide = ranks_1024()
    page_of(tmp_path / "one", [result("wide", "CORRUPT", **wide, suite="distbench run")])
    assert (tmp_path / "one" / "results.html").stat().st_size <= MIB
    many = page_of(tmp_path / "many", [result(f"{number}", "CORRUPT", **wide, **case(number)) for number in range(120)])
    assert (tmp_path / "many" / "results.html").stat().st_size <= 5 * MIB
    assert 1 < len(many.xpath("//article")) < 120
    assert f"{120 - len(many.xpath('//article'))} further cases have no details" in words(many)


def test_page_is_well_formed_and_needs_no_colour(tmp_path: Path) -> None:
    page_of(tmp_path, [failing()])
    text = (tmp_path / "results.html").read_text(encoding="utf-8")
    for drawing in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        etree.fromstring(drawing)
    root = read_page(tmp_path / "results.html")
    assert all(one.get("aria-label") for one in root.xpath("//svg"))
    assert all(one.get("tabindex") == "0" for one in root.xpath("//*[contains(@class, 'scroll')]"))
    levels = [int(one.tag[1]) for one in root.iter("h1", "h2", "h3")]
    assert all(later - earlier <= 1 for earlier, later in pairwise(levels))


def test_grid_of_equal_cases_is_one_cell(tmp_path: Path) -> None:
    write_results(tmp_path, [result(**case(1))])
    (one,) = (cell_of(0, found, detailed=True) for found in Results(tmp_path))
    assert grid_of([one]) == ("", "", [""], [("", [[one]])])
