"""Syntax of `inject`."""

from __future__ import annotations

import pytest

from distbench.case.injection import Injection, parse_inject
from distbench.errors import InvalidCase
from tests.cases import tiny_case


def test_several_faults_with_options_are_parsed() -> None:
    assert parse_inject("") == ()
    assert parse_inject("hang; flipped-bit:rank=2, arm=truncated") == (
        Injection("hang", {}),
        Injection("flipped-bit", {"rank": "2", "arm": "truncated"}),
    )


@pytest.mark.parametrize("text", ["Hang", "hang:rank", "hang:rank=", "hang:=1", "hang:rank=1,rank=2", "a b"])
def test_malformed_inject_text_is_refused(text: str) -> None:
    with pytest.raises(InvalidCase, match="inject = "):
        tiny_case(inject=text)
