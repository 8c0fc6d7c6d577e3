"""The faults that a case can inject, read from the text of their modules: a list of them needs no torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import resources
from typing import NamedTuple

from distbench.case.stages import Stage

MODULES = ("limit", "dispatch", "experts", "combine", "process", "overlap", "symmetric")


class Listed(NamedTuple):
    """A fault: its name for --inject, its stage or "", what goes wrong, and the public report that it stands for."""

    name: str
    stage: str
    text: str
    bug: str


def listed_faults() -> list[Listed]:
    """All faults in the order of `FAULTS` (distbench/faults/injector.py)."""
    folder = resources.files(__package__ or "distbench.faults")
    texts = [(folder / f"{module}.py").read_text(encoding="utf-8") for module in MODULES]
    return [fault for text in texts for fault in _faults(ast.parse(text))]


def _faults(module: ast.Module) -> Iterator[Listed]:
    for node in module.body:
        values = dict(_assigned(node)) if isinstance(node, ast.ClassDef) else {}
        if isinstance(node, ast.ClassDef) and "name" in values:  # bases of faults have none
            yield Listed(values["name"], values["stage"], ast.get_docstring(node) or "", values["bug"])


def _assigned(node: ast.ClassDef) -> Iterator[tuple[str, str]]:
    """Names and texts that the body of a class assigns: literals, and members of Stage."""
    for statement in node.body:
        if not isinstance(statement, ast.Assign):
            continue
        target, value = statement.targets[0], statement.value
        if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
            pairs = list(zip(target.elts, value.elts, strict=True))
        else:
            pairs = [(target, value)]
        for name, one in pairs:
            if isinstance(one, ast.Constant):
                yield ast.unparse(name), str(one.value)
            elif isinstance(one, ast.Attribute) and ast.unparse(one.value) == Stage.__name__:
                yield ast.unparse(name), Stage[one.attr].value
