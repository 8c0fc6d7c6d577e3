"""Sizes of a sweep: numbers and ranges."""

from __future__ import annotations

import pytest

from distbench.case.tokens import parse_sizes
from distbench.errors import InvalidCase


@pytest.mark.parametrize(
    ("text", "sizes"),
    [
        ("1:16:*2", (1, 2, 4, 8, 16)),
        ("1:20:*4", (1, 4, 16)),
        ("3:24", (3, 6, 12, 24)),
        ("64:256:+64", (64, 128, 192, 256)),
        ("64:256:96", (64, 160, 256)),
        ("0:8:+4", (0, 4, 8)),
        ("1, 16,4096", (1, 16, 4096)),
        ("8,1:8:*2", (8, 1, 2, 4)),
        ("7", (7,)),
        ("0", (0,)),
        ("5:5", (5,)),
    ],
)
def test_numbers_and_ranges_are_sizes(text: str, sizes: tuple[int, ...]) -> None:
    assert parse_sizes(text) == sizes


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("", "neither a number nor a range"),
        ("1:", "neither a number nor a range"),
        ("1:8:/2", "neither a number nor a range"),
        ("1:8:*2:3", "neither a number nor a range"),
        ("-1", "neither a number nor a range"),
        ("4kb", "neither a number nor a range"),
        ("\u0661", "neither a number nor a range"),
        ("8:1", "does not get from its start to its end"),
        ("1:8:*1", "does not get from its start to its end"),
        ("1:8:*0", "does not get from its start to its end"),
        ("1:8:+0", "does not get from its start to its end"),
        ("0:8", "does not get from its start to its end"),
        ("1:999999999:+1", "more than 256 sizes"),
    ],
)
def test_other_texts_are_refused_with_the_reason(text: str, why: str) -> None:
    with pytest.raises(InvalidCase, match=why):
        parse_sizes(text)
