"""Names of functions in a case."""

from __future__ import annotations

from functools import partial
from types import FunctionType
from typing import Any

import pytest

from distbench.case.plugins import is_reference
from distbench.launcher.in_group import name_of


def named(module: str, name: str) -> FunctionType:
    made: Any = lambda: None  # noqa: E731 - a function of any name
    made.__module__, made.__qualname__ = module, name
    return made  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (named("own.parts", "Class.dispatch"), "own_parts:Class_dispatch"),
        (named("1_test", "<lambda>"), "_1_test:_lambda_"),
        (named("prüfung", "make.<locals>.größe"), "pr_fung:make_locals_gr_e"),
        (partial(print), "functools:partial"),
    ],
)
def test_name_of_any_function_is_a_reference(function: Any, name: str) -> None:
    assert name_of(function) == name
    assert is_reference(name)
