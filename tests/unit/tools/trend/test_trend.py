"""`distbench trend`: the order of nights, histories of cases, levels against their bounds, and what is written."""

from __future__ import annotations

import csv
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from distbench.cli.main import main
from distbench.errors import Verdict
from distbench.tools.compare.noise import ALPHA
from distbench.tools.trend.history import Ending, Histories, History
from distbench.tools.trend.nights import find_nights
from distbench.tools.trend.page import page_of
from distbench.tools.trend.table import COLUMNS
from distbench.tools.trend.times import StageTrend, Times, levels
from distbench.tools.trend.trend import NightTotals, Trend, trend_of
from tests.pages import HOSTILE, MIB, read_page, words
from tests.results import result, timing, write_results

LETTERS = {"P": "PASS", "C": "CORRUPT", "H": "HANG", "U": "UNDER_LIMIT"}


def day(number: int) -> str:
    return f"2026-11-{number + 1:02d}T02:00:00Z"


def write_nights(root: Path, nights: Sequence[Iterable[dict[str, Any]]], cases: int | None = None) -> Path:
    for number, reports in enumerate(nights):
        write_results(root / f"n{number}", [one | {"ended": day(number)} for one in reports], cases)
    return root


def trend_in(*paths: Path) -> Trend:
    return trend_of(find_nights([str(path) for path in paths], 90).nights, lambda *_: None)


def histories(root: Path, *cases: str) -> Trend:
    """Trend of cases whose endings are letters, a night each: `.` for no result."""
    nights = [
        [result(f"case {place}", LETTERS[case[night]]) for place, case in enumerate(cases) if case[night] != "."]
        for night in range(len(cases[0]))
    ]
    return trend_in(write_nights(root, nights))


def changes(trend: Trend) -> list[tuple[str, int, str]]:
    return [(case.name, change.night, change.kind) for case, change in trend.changes()]


def test_nights_are_ordered_by_their_results_and_not_by_their_names(tmp_path: Path) -> None:
    for name, number in (("job-9", 0), ("job-10", 1), ("job-11", 2)):
        write_results(tmp_path / name, [result(ended=day(number))])
    assert [night.name for night in trend_in(tmp_path).nights] == ["job-9", "job-10", "job-11"]
    newest = find_nights([str(tmp_path)], 2)
    assert ([night.name for night in newest.nights], newest.left_out) == (["job-10", "job-11"], 1)


def test_results_without_a_time_have_that_of_their_file(tmp_path: Path) -> None:
    for name, age in (("new", 0), ("old", 100_000)):
        folder = write_results(tmp_path / name, [result()])
        os.utime(folder / "results.jsonl", (2e9 - age, 2e9 - age))
    assert [night.name for night in trend_in(tmp_path).nights] == ["old", "new"]


def test_same_folder_named_twice_is_one_night_and_like_names_are_told_apart(tmp_path: Path) -> None:
    write_nights(tmp_path / "a", [[result()]])
    write_nights(tmp_path / "b", [[result()], [result()]])
    found = find_nights([str(tmp_path / "a"), str(tmp_path / "a" / "n0"), str(tmp_path / "b")], 90)
    assert [night.name for night in found.nights] == [str(tmp_path / "a/n0"), str(tmp_path / "b/n0"), "n1"]


def test_folder_without_results_is_refused_and_one_beside_nights_is_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "none" / "inside").mkdir(parents=True)
    assert main(["trend", str(tmp_path / "none")]) == 2
    told = f"trend {tmp_path / 'none'}: no results.jsonl in it, nor in any of its 1 folders; give the --out folders"
    assert told in capsys.readouterr().err
    assert main(["trend", str(tmp_path / "nowhere")]) == 2
    assert "No such file or directory; give the --out folders" in capsys.readouterr().err
    write_nights(tmp_path, [[result()]])
    assert main(["trend", str(tmp_path)]) == 0
    assert f"{tmp_path / 'none'}: no results in it; left out" in capsys.readouterr().err


def test_nights_without_a_single_result_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_nights(tmp_path, [[], []], cases=3)
    assert main(["trend", str(tmp_path)]) == 2
    assert "2 nights without a single result" in capsys.readouterr().err


@pytest.mark.parametrize("line", [b"{}\n", b"[" * 3000 + b"\n", b'{"schema": "other"}\n'])
def test_damaged_results_are_refused_with_their_place(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], line: bytes
) -> None:
    write_nights(tmp_path, [[result()]])
    (tmp_path / "n0" / "results.jsonl").write_bytes(line)
    assert main(["trend", str(tmp_path)]) == 2
    assert "results.jsonl, line 1: " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("endings", "since", "first"),
    [
        ("PPPP", None, None),
        ("PPCC", 2, 2),
        ("PCPC", 3, 1),
        ("CCPP", None, 0),
        ("CCCC", 0, 0),
        ("PPCH", 2, 2),
        ("PC.C", 1, 1),
        ("PC..", 1, 1),
    ],
)
def test_case_is_bad_since_the_first_night_of_its_unbroken_failures(
    tmp_path: Path, endings: str, since: int | None, first: int | None
) -> None:
    case = histories(tmp_path, endings, "PPPP").cases[0]
    assert (case.bad_since, case.went_bad) == (since, first)
    assert case.rate.seen == endings.count("P")
    assert case.rate.tried == 4 - endings.count(".")


def test_changes_have_the_kinds_of_compare(tmp_path: Path) -> None:
    trend = histories(tmp_path, "PPPPP", "PCPPP", "CCHHC", "PP..P", "..CPP", "..PPP", "C....")
    assert changes(trend) == [
        ("case 1", 1, "regressed"),
        ("case 1", 2, "fixed"),
        ("case 2", 2, "regressed"),
        ("case 2", 4, "still failing"),
        ("case 3", 2, "absent"),
        ("case 6", 1, "absent"),
        ("case 4", 2, "new failure"),
        ("case 4", 3, "fixed"),
    ]
    assert [case.name for case in trend.troubled()] == ["case 2", "case 6", "case 1", "case 4"]


def test_night_without_results_makes_no_case_absent(tmp_path: Path) -> None:
    write_nights(tmp_path, [[result()], [], [result()]], cases=1)
    os.utime(tmp_path / "n1" / "results.jsonl", (1793591999, 1793591999))  # 2026-11-01T23:59:59Z, between the others
    trend = trend_in(tmp_path)
    assert [night.missing for night in trend.nights] == [0, 1, 0]
    assert not changes(trend)


def test_case_with_other_keys_is_known_by_its_name_and_marked(tmp_path: Path) -> None:
    other = result("a", case={"model": "tiny", "ep_size": 4, "hash": "another"})
    trend = trend_in(write_nights(tmp_path, [[result("a")], [other], [other]]))
    assert changes(trend) == [("a", 1, "another case")]
    assert (len(trend.cases), trend.cases[0].hash) == (1, "another")


def test_cases_of_one_name_are_told_apart_by_their_hash() -> None:
    class One:
        def __init__(self, case: str) -> None:
            self.suite, self.name, self.hash, self.expect = "", "run", case, "PASS"
            self.verdict, self.as_expected, self.reasons = Verdict.PASS, True, ()

    found = Histories(2)
    assert found.take(0, [One("x"), One("y")]) == [0, 1]  # type: ignore[list-item]
    assert found.take(1, [One("y"), One("z")]) == [1, 2]  # type: ignore[list-item]


def noisy(nights: int, cases: int = 20, *, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float64]]:
    """Logarithms of medians: nights 3 % apart, cases 1 % apart within one."""
    random = np.random.default_rng(seed)
    base = random.uniform(1, 9, cases)
    return base + random.normal(0, 0.03, (nights, 1)) + random.normal(0, 0.01, (nights, cases))


def flags(medians: np.ndarray[Any, np.dtype[np.float64]]) -> str:
    found = levels(medians, ALPHA / 2)
    return "".join("." if one is None else "s" if one.slower else "f" if one.faster else "-" for one in found)


def test_slowdown_that_lasts_is_out_of_bounds_every_night_and_dated_to_its_first() -> None:
    medians = noisy(20)
    medians[14:] += np.log(1.3)
    assert flags(medians) == "-" * 14 + "s" * 6
    assert StageTrend("a", "s", levels(medians, ALPHA)).slower_since == 14
    medians[19:] -= np.log(1.3)
    assert flags(medians) == "-" * 14 + "s" * 5 + "-"
    assert StageTrend("a", "s", levels(medians, ALPHA)).slower_since is None
    assert flags(-medians) == "-" * 14 + "f" * 5 + "-"


def test_noise_alone_is_called_slower_as_often_as_promised() -> None:
    called = sum(flags(noisy(12, 5, seed=seed)).count("s") for seed in range(300))
    assert 5 <= called <= 21  # 300 series of 7 judged nights: 21 are 1 %


def test_change_is_that_of_the_cases_in_common_and_unlike_nights_begin_anew() -> None:
    medians = noisy(9, 6)
    medians[4:, 0] += 5.0
    medians[5, :3] = np.nan
    medians[6] = np.nan
    found = levels(medians, ALPHA)
    assert found[6] is None
    assert all(abs(one.level) < 0.2 for one in found if one is not None)
    apart = np.full((6, 2), np.nan)
    apart[::2, 0] = 1.0
    apart[1::2, 1] = 7.0
    assert [(one.level, one.references) for one in levels(apart, ALPHA) if one] == [
        (0.0, count) for count in (0, 0, 1, 1, 2, 2)
    ]


def test_first_five_nights_have_no_bounds_and_equal_times_are_no_change() -> None:
    found = levels(np.zeros((7, 3)), ALPHA)
    assert [one.bounds for one in found if one] == [None] * 5 + [(0.0, 0.0)] * 2
    assert flags(np.zeros((7, 3))) == "-------"


@pytest.mark.parametrize("median", [-1.0, "x", None])
def test_time_that_is_no_time_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], median: Any) -> None:
    broken = result("odd", timing={"padded": {"experts": {"median_us": median}}, "wall_s": 1.0})
    write_nights(tmp_path, [[broken]])
    assert main(["trend", str(tmp_path)]) == 2
    assert "odd" in capsys.readouterr().err


def written(root: Path, *arguments: str) -> tuple[list[dict[str, str]], Path]:
    """Rows of the CSV and the path of the page."""
    page, table = root / "trend.html", root / "trend.csv"
    assert main(["trend", str(root), "--report", f"html={page},csv={table}", *arguments]) == 0
    return list(csv.DictReader(table.read_text(encoding="utf-8").splitlines())), page


def test_page_and_table_say_what_changed_and_since_when(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nights = []
    for night in range(8):
        new = {"hosts": ["a"], "devices": [], "versions": {"torch": "2.13" if night > 5 else "2.12"}}
        environment = new | {"commits": {}, "variables": {}}
        times = timing(1.0 if night < 6 else 2.0) | {"wall_s": 1.0}
        endings = ("PASS", "CORRUPT" if night > 4 else "PASS")
        nights.append([result(f"c{n}", one, timing=times, environment=environment) for n, one in enumerate(endings)])
    rows, page = written(write_nights(tmp_path, nights))
    assert (len(rows), tuple(rows[0])) == (16, COLUMNS)
    assert [(row["night"], row["change"]) for row in rows if row["change"]] == [("n5", "regressed")]
    assert {row["bad_since"] for row in rows if row["name"] == "c1"} == {"n5"}
    assert rows[-1]["truncated_experts_median_us"] == "4.0"
    text = words(read_page(page))
    for told in (
        "bad now: 1, the longest since n5",
        "n5c1regressedPASSCORRUPT",
        "c1✓✓✓✓✓C!C!C!n5",
        "truncated, experts: newest 4 µs, +100.0 % on 6 nights before, bound +0.0 %; SLOWER since n6",
        "n6versions.torch2.122.13",
    ):
        assert told in text
    shown = capsys.readouterr().out
    assert (
        "8 nights; n7: 1 of 2 cases as expected; bad now: 1, the longest since n5; of 16 timed stages slower" in shown
    )
    assert re.search(r"truncated/experts +4 µs +\+100.0 % +\+0.0 % +SLOWER since n6", shown)


def test_quiet_is_the_conclusion_alone_and_verbose_shows_every_night(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_nights(tmp_path, [[result(timing={"wall_s": 1.0})]] * 20)
    assert main(["trend", str(tmp_path), "--quiet"]) == 0
    assert capsys.readouterr().out.startswith("20 nights; n19: 1 of 1 case as expected")
    for flag, shown in (("--last=20", 14), ("--verbose", 20)):
        assert main(["trend", str(tmp_path), flag]) == 0
        text = capsys.readouterr().out
        assert len(re.findall(r"^n\d+ ", text, re.MULTILINE)) == shown
        assert ("6 earlier nights: --verbose" in text) is (shown == 14)


def test_night_alone_and_times_of_none_are_a_trend(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows, page = written(write_nights(tmp_path, [[result("only", timing={"wall_s": 1.0})]]))
    assert [row["padded_experts_median_us"] for row in rows] == [""]
    assert "None: every result of every night was expected." in words(read_page(page))
    assert "Times by stage" not in words(read_page(page))
    assert "1 night; n0: 1 of 1 case as expected; none bad now" in capsys.readouterr().out


def test_hostile_text_stays_text_and_no_cell_is_a_formula(tmp_path: Path) -> None:
    reasons = [{"code": HOSTILE, "message": HOSTILE}]
    facts = {"hosts": [HOSTILE], "devices": [HOSTILE], "commits": {}, "variables": {}}
    nights = [
        [
            result(
                f"=1+1{HOSTILE}" if number else f"{HOSTILE}{'n' * 9000}",
                verdict,
                reasons=reasons,
                expect=HOSTILE,
                suite=HOSTILE,
                timing={HOSTILE: {HOSTILE: {"median_us": 1.0}}, "wall_s": 1.0},
                environment=facts | {"versions": {HOSTILE: f"{HOSTILE}{number}{verdict}"}},
            )
            for number in range(2)
        ]
        for verdict in ("PASS", "CORRUPT")
    ]
    rows, page = written(write_nights(tmp_path, nights))
    assert "javascript:x {{ 7*7 }}" in words(read_page(page))
    assert "<script" not in page.read_text()
    assert not set(page.read_text()) & {"\x1b", "\u202e"}
    assert {row["name"][:4] for row in rows} == {"'=1+", HOSTILE[:4]}


def test_page_of_many_nights_and_failures_stays_below_its_size(tmp_path: Path) -> None:
    good = Ending(Verdict.PASS, as_expected=True, expect="PASS", reason="")
    bad = Ending(Verdict.CORRUPT, as_expected=False, expect="x" * 300, reason="r" * 300)
    nights = [
        NightTotals(f"night {night}", "path", day(0), 250, 125, 0, Counter({Verdict.PASS: 250}), 1)
        for night in range(28)
    ]
    cases = [
        History(
            "smoke", f"{case} {'n' * 300}", str(case), [(good, bad)[(night + case) % 2] for night in range(28)], set()
        )
        for case in range(250)
    ]
    (tmp_path / "trend.html").write_text(page_of(Trend(["smoke"], nights, cases, Times(28), [], [])), encoding="utf-8")
    assert (tmp_path / "trend.html").stat().st_size < 2 * MIB
    text = words(read_page(tmp_path / "trend.html"))
    assert "50 more are in the CSV" in text
    assert "6550 earlier changes are in the CSV" in text


def test_other_formats_are_refused_before_anything_is_read(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_nights(tmp_path, [[result()]])
    assert main(["trend", str(tmp_path), "--report", "junit"]) == 2
    assert "this command does not write it; allowed are html, csv" in capsys.readouterr().err
