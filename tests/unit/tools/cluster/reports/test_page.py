"""The page of a cluster's plan: a mark for every node and link, the slow ones, and nothing that runs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
from lxml import html

from distbench.case.stages import Stage
from distbench.cli.main import main
from distbench.tools.cluster.attribution import GroupRun
from distbench.tools.cluster.plan import STEPS, Group, Round, Step
from distbench.tools.cluster.reports import page
from distbench.tools.cluster.validation import FILE, Validation, document, validate
from tests.pages import HOSTILE, MIB, read_page, words
from tests.results import result, write_results

KEYS = [f"case {number}" for number in range(4)]


def validated(
    nodes: Sequence[str], failing: Callable[[Group], bool] = lambda _: False, slow: str = "", why: str = "why"
) -> Validation:
    """A plan in which some groups fail, and `slow` takes twice as long, alone."""

    def run(step: Step, groups: Round) -> list[GroupRun]:
        return [
            GroupRun(
                step=step,
                nodes=group,
                exit_code=1 if failing(group) else 0,
                verdict="CORRUPT" if failing(group) else "PASS",
                reason=why if failing(group) else "",
                devices=("gfx942",),
                times={Stage.EXPERTS: {key: (2.0 if slow in group else 1.0) + len(group[0]) / 1e3 for key in KEYS}},
            )
            for group in groups
        ]

    return validate(tuple(nodes), STEPS, run, emulated=False, suite="smoke")


def page_of(folder: Path, validation: Validation) -> html.HtmlElement:
    folder.mkdir(exist_ok=True)
    (folder / FILE).write_bytes(document(validation))
    assert main(["report", str(folder), "--report", "html"]) == validation.exit_code
    return read_page(folder / "results.html")


def names(count: int) -> list[str]:
    return [f"node{number:03d}{'x' * (number % 7)}" for number in range(count)]


def signs(root: html.HtmlElement) -> list[list[str]]:
    return [[cell.text for cell in row.xpath("td")] for row in root.xpath("//table[@class='links']/tbody/tr")]


def test_link_at_fault_is_marked_at_both_ends_and_named_first(tmp_path: Path) -> None:
    root = page_of(tmp_path, validated("abc", lambda group: set("ac") <= set(group)))
    assert words(root, "//h1") == "✗ 1 link at fault"
    assert signs(root) == [["✓", "✓", "C!"], ["✓", "✓", "✓"], ["C!", "✓", "✓"]]
    assert "link a and c: these two fail together: CORRUPT: why" in words(root, "//section[1]")
    assert "a, c" in words(root, "//section[h2='Groups that failed']")


def test_node_at_fault_has_links_that_were_not_run(tmp_path: Path) -> None:
    root = page_of(tmp_path, validated("abc", lambda group: "b" in group))
    assert signs(root) == [["✓", "·", "✓"], ["·", "C!", "·"], ["✓", "·", "✓"]]
    assert "1 node at fault" in words(root, "//h1")


def test_slow_node_is_marked_and_its_time_is_beside_the_others(tmp_path: Path) -> None:
    nodes = names(8)
    root = page_of(tmp_path, validated(nodes, slow=nodes[3]))
    assert "1 slow node" in words(root, "//h1")
    assert [row[3] for row in signs(root)].count("~") == 1
    alarm = root.xpath("//*[local-name()='text'][@class='alarm']")[0]
    assert alarm.text.startswith(f"experts, alone: up to 1.99, {nodes[3]}")


def test_healthy_cluster_is_good_and_says_what_was_not_judged(tmp_path: Path) -> None:
    root = page_of(tmp_path, validated("ab"))
    assert root.xpath("//header/@class") == ["verdict good"]
    assert words(root, "//h1") == "✓ No node or link at fault"
    assert "not judged: slow nodes: 2 nodes pass, at least 5 are needed" in words(root, "//section")


@pytest.mark.parametrize("mapped", [True, False])
def test_map_of_many_nodes_is_a_picture_and_of_very_many_a_list(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mapped: bool
) -> None:
    monkeypatch.setattr(page, "MOST_MAPPED", 60 if mapped else 59)
    nodes = names(60)
    root = page_of(tmp_path, validated(nodes, lambda group: set(nodes[:2]) <= set(group)))
    assert (tmp_path / "results.html").stat().st_size < MIB
    assert not root.xpath("//table[@class='links']")
    bad = root.xpath("//*[local-name()='path'][@class='cell bad']/@d")
    assert bad == (["M1 0h1v1h-1zM0 1h1v1h-1z"] if mapped else [])
    assert f"link {nodes[0]} and {nodes[1]}" in words(root)


def test_hostile_names_and_reasons_stay_text(tmp_path: Path) -> None:
    nodes = [f"{HOSTILE}{number}" for number in range(6)]
    root = page_of(tmp_path, validated(nodes, lambda group: group == (nodes[0],), why=HOSTILE * 99))
    assert "<script>alert(1)</script>" in words(root)
    assert "<script" not in (tmp_path / "results.html").read_text(encoding="utf-8")


def test_file_that_is_no_plan_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = document(validated("ab"))
    times = (whole.replace(b"1.001", wrong) for wrong in (b"0.0", b"-1", b"1e300"))
    for content in (b"{}", b"[[[", whole.replace(b"cluster/1", b"cluster/9"), *times):
        (tmp_path / FILE).write_bytes(content)
        assert main(["report", str(tmp_path / FILE), "--report", "html"]) == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert main(["report", str(tmp_path / "none" / FILE), "--report", "html"]) == 2


def test_results_of_cases_come_before_a_plan_in_one_folder(tmp_path: Path) -> None:
    write_results(tmp_path, [result("only")])
    (tmp_path / FILE).write_bytes(document(validated("ab")))
    assert main(["report", str(tmp_path), "--report", "html"]) == 0
    assert "only" in words(read_page(tmp_path / "results.html"))
