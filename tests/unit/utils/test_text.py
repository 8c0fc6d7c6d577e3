"""Numbers with their nouns, and refusals of numbers in words."""

from __future__ import annotations

from typing import Annotated, Any

import msgspec
import pytest

from distbench.utils.text import counted, in_words


@pytest.mark.parametrize(
    ("number", "noun", "words"),
    [(0, "row", "0 rows"), (1, "row", "1 row"), (2, "lost row", "2 lost rows"), (3, "launch", "3 launches")],
)
def test_noun_follows_its_number(number: int, noun: str, words: str) -> None:
    assert counted(number, noun) == words


@pytest.mark.parametrize(
    ("kind", "value", "words"),
    [
        (Annotated[int, msgspec.Meta(ge=1)], 0, "allowed are whole numbers from 1 up"),
        (Annotated[int, msgspec.Meta(le=1 << 24)], 1 << 30, "allowed are whole numbers up to 16777216"),
        (Annotated[float, msgspec.Meta(gt=0.0)], 0.0, "allowed are numbers above 0"),
        (Annotated[float, msgspec.Meta(lt=0.5)], 0.5, "allowed are numbers below 0.5"),
        (int, "x", "allowed are whole numbers"),
        (tuple[int, ...], [1, "x"], "allowed are whole numbers; number 2 is none of them"),
        (str, 1, "Expected `str`, got `int`"),
    ],
)
def test_refusal_of_a_number_says_what_is_allowed(kind: Any, value: object, words: str) -> None:
    with pytest.raises(msgspec.ValidationError) as refusal:
        msgspec.convert(value, kind)
    assert in_words(str(refusal.value)) == words
