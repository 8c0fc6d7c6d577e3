"""The check of prose: each rule has a phrase that it finds and a plain one that passes, and places are exact."""

from __future__ import annotations

import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
BANNED = {
    "Return wh" + "at a script prints.": "Lines that a script prints.",
    "Wh" + "at is wrong there was made wrong there.": "The stage where the damage originates.",
    "Wh" + "at is sent is encrypted.": "Messages are encrypted.",
    "See wh" + "at is sent: it is wh" + "at arrives.": "Received rows are the rows sent.",
    "Return it with so ma" + "ny tokens more.": "Add token counts.",
    "The user is to" + "ld of the fault.": "The report names the fault.",
    "A report that tells" + " of a rank.": "A report that names a rank.",
    "The disk is full and no" + "body waits.": "Ignored if the disk is full.",
    "Compiled an" + "ew for each shape.": "Compiled again for each shape.",
    "An agent waits for its li" + "ke.": "An agent waits for the agents of other nodes.",
    "The number that became o" + "f the ranks.": "The outcome of the ranks.",
    "95 % su" + "re to be below.": "95 % CI 0 to 2,380.",
    "A stand-in in the pla" + "ce of mori.": "A stand-in for mori.",
    "Two devices apie" + "ce.": "Two devices each.",
}


@pytest.fixture(scope="module")
def script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / "scripts" / "check_prose.py"))


@pytest.mark.parametrize(("banned", "plain"), BANNED.items())
def test_each_banned_phrase_is_found_and_its_plain_form_is_not(script: dict[str, Any], banned: str, plain: str) -> None:
    assert list(script["found"](banned))
    assert not list(script["found"](plain))


def test_every_rule_has_a_banned_example(script: dict[str, Any]) -> None:
    assert all(any(rule.pattern.search(text) for text in BANNED) for rule in script["RULES"])


def test_phrase_is_found_across_a_line_break(script: dict[str, Any]) -> None:
    assert [(line, phrase) for line, phrase, _ in script["found"]("One line.\nRows so\n  of" + "ten read.")] == [
        (1, "so of" + "ten")
    ]


def test_places_of_docstrings_comments_strings_and_markdown_are_exact(script: dict[str, Any], tmp_path: Path) -> None:
    often, nobody = "so of" + "ten", "no" + "body"
    (tmp_path / "a.py").write_text(
        f'"""A module.\n\nIt polls {often}.\n"""\n\n'
        f'{nobody} = 1\n# First line,\n# and {nobody} waits.\nx = "ends {often}"\n'
    )
    (tmp_path / "b.md").write_text(f"# Title\n\nIt polls {often}.\n")
    places, lines = script["check"]([tmp_path])
    assert [(place.path.name, place.line) for place in places] == [("a.py", 3), ("a.py", 8), ("a.py", 9), ("b.md", 3)]
    assert lines == 2 + 2 + 1 + 2


@pytest.mark.parametrize(("plain_lines", "code"), [(998, 0), (997, 0), (996, 1)])
def test_exit_code_is_1_above_three_phrases_per_1000_lines(
    script: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str], plain_lines: int, code: int
) -> None:
    page = tmp_path / "page.md"
    bad = ["no" + "body waits"] * 3
    page.write_text("\n\n".join(bad + ["plain words"] * plain_lines))
    assert script["main"]([str(page)]) == code
    printed = capsys.readouterr()
    assert (f"{page}:1: 'no" + "body'" in printed.out) == bool(code)
    assert "per 1,000; at most 3" in printed.err


def test_rules_do_not_match_their_own_source(script: dict[str, Any]) -> None:
    assert script["check"]([ROOT / "scripts" / "check_prose.py"])[0] == []
