"""Numbers with their nouns."""

from __future__ import annotations

import pytest

from distbench.utils.text import counted


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [(0, "row", "0 rows"), (1, "row", "1 row"), (2, "lost row", "2 lost rows"), (3, "launch", "3 launches")],
)
def test_noun_follows_its_number(number: int, noun: str, words: str) -> None:
    assert counted(number, noun) == words
