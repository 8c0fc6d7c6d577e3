"""Screens of commands are those of tests/golden/, within the width, with every number of the widest one.

`.venv/bin/python -m tests.screens` writes them again.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path

import pytest

from distbench.report import terminal
from distbench.report.terminal import Grid, folded, print_line, print_parts, print_table, print_text, print_verdict
from tests.screens import GOLDEN, SCREENS, WIDTHS, Screen, drawn, golden

NUMBERS = re.compile(r"\d+(?:\.\d+)?")


@pytest.mark.parametrize("name", SCREENS)
@pytest.mark.parametrize("width", WIDTHS)
def test_screen_is_the_golden_one(name: str, width: str) -> None:
    assert drawn(name, WIDTHS[width]) == golden(name, width).read_text(encoding="utf-8")


def test_every_golden_file_is_a_screen() -> None:
    assert {path.name for path in GOLDEN.iterdir()} == {
        golden(name, width).name for name in SCREENS for width in WIDTHS
    }


@pytest.mark.parametrize("name", SCREENS)
def test_golden_screens_stay_within_the_width_and_cut_no_number(name: str) -> None:
    pipe = golden(name, "pipe").read_text(encoding="utf-8")
    for width, columns in WIDTHS.items():
        text = golden(name, width).read_text(encoding="utf-8")
        assert max(map(len, text.splitlines())) <= (columns or len(pipe))
        assert not any(line.endswith(" ") for line in text.splitlines())
        assert set(NUMBERS.findall(text)) == set(NUMBERS.findall(pipe))


@pytest.fixture(autouse=True)
def _colours(monkeypatch: pytest.MonkeyPatch) -> None:
    """A terminal of 60 columns, with colours."""
    for name, value in (("COLUMNS", "60"), ("TERM", "xterm-256color")):
        monkeypatch.setenv(name, value)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)


def printed(*actions: Callable[[], None], live: bool = True) -> str:
    """What the actions print to a terminal, or to a pipe."""
    screen = Screen(live=live)
    with redirect_stdout(screen):
        for action in actions:
            action()
    return screen.getvalue()


@pytest.mark.parametrize(("code", "colour"), [(0, 32), (1, 31), (3, 31), (2, 33), (75, 33), (77, 33)])
def test_verdict_has_the_colour_of_its_exit_code(code: int, colour: int) -> None:
    assert printed(lambda: print_verdict("the end", code)) == f"\x1b[1;{colour}mthe end\x1b[0m\n"


@pytest.mark.parametrize("variable", ["NO_COLOR", "TERM"])
def test_no_colour_is_printed_where_the_environment_asks_for_none(
    monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    table = partial(print_table, [("a", "NO")], ("one", "equal"))
    assert "\x1b[1;31m" in printed(table)
    monkeypatch.setenv(variable, "dumb")
    assert "\x1b" not in printed(lambda: print_verdict("the end", 1), table)


def test_pipe_gets_no_colour_and_whole_lines() -> None:
    text = printed(lambda: print_verdict("x " * 100, 1), lambda: print_text("y " * 100), live=False)
    assert text.splitlines() == ["x " * 100, "y " * 100]


def test_continuation_of_a_line_is_indented_below_it() -> None:
    lines = printed(lambda: print_text("  " + "word " * 20, "x" * 130)).splitlines()
    assert lines[0].startswith("  word")
    assert lines[1].startswith("    word")
    assert max(map(len, lines)) <= 60
    assert "".join(lines[2:]).replace(" ", "") == "x" * 130
    assert printed(lambda: print_line("z" * 130)) == "z" * 130 + "\n"


@pytest.mark.parametrize("width", range(40, 140, 7))
def test_table_of_words_and_numbers_fits_any_width_and_loses_nothing(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("NO_COLOR", "1")
    rows = [
        ("swapped-rows + flipped-token-bit", "1 BASELINE_WRONG", "0.998 to 1.004", "several faults at once", "12345.6"),
        ("hang", "1 HANG", "0.1 to 1.1", "", "7"),
    ]
    text = printed(lambda: print_table(rows, ("fault", "verdict", "of ideal", "diagnosis", "figure")))
    assert max(map(len, text.splitlines())) <= width
    assert {word for row in rows for cell in row for word in cell.split()} <= set(re.split(r"[\s,]+", text))


def test_columns_that_say_the_same_are_one_line() -> None:
    grid = Grid(("a", "b", "c", "d", "e"), [("1", "x", "-", "", "k"), ("2", "x", "-", "", "k")])
    assert folded(grid, ("e",)) == ["all rows: b x", Grid(("a", "e"), [("1", "k"), ("2", "k")])]
    alone = Grid(("a", "b"), [("1", "x")])
    assert folded(alone) == [alone]
    assert folded(Grid(("a", "b"), [])) == [Grid(("a", "b"), [])]


@pytest.mark.parametrize("rows", [[], [("",)], [("one",)]])
def test_table_with_few_cells_prints(rows: list[tuple[str, ...]]) -> None:
    assert "head" in printed(lambda: print_parts([Grid(("head",), rows)]))


@pytest.mark.parametrize(
    ("cell", "number"),
    [("", True), ("3/4", True), ("-0.4", True), ("1e+03", True), ("0.99 to 1.01", True), ("off", True), ("0-7", True),
     ("1 CORRUPT", False), ("2-stage", False), ("0.0058 (0.0069)", True), ("tot", False)],
)  # fmt: skip
def test_cell_of_figures_is_a_number(cell: str, number: bool) -> None:
    assert terminal.is_number(cell) == number


def test_stored_results_name_no_machine() -> None:
    for path in (Path(__file__).parents[2] / "data" / "screens").iterdir():
        text = path.read_text(encoding="utf-8")
        assert not re.search(r'"(?:/(?:root|home|tmp|work)[/"])|localhost', text), path
