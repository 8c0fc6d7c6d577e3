"""Text of a released wheel, read and never installed; definitions are found by `ast`."""

from __future__ import annotations

import ast
import copy
import functools
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from packaging.utils import parse_wheel_filename


class Gone(LookupError):
    """The text has no such file, definition or passage."""


class Source:
    """A wheel at `path`. `changes` replaces the text of some files."""

    def __init__(self, path: Path, changes: Mapping[str, str] | None = None) -> None:
        """Open the wheel.

        Raises:
            ValueError: the file's name is not that of a wheel.
            OSError, zipfile.BadZipFile: the file cannot be read.

        """
        distribution, version, _, _ = parse_wheel_filename(path.name)
        self.distribution, self.version, self.path = str(distribution), str(version), path
        self._archive = zipfile.ZipFile(path)
        self._changes = dict(changes or {})

    def changed(self, changes: Mapping[str, str]) -> Source:
        """The same wheel with other text in some files."""
        other = copy.copy(self)
        other._changes = dict(changes)  # noqa: SLF001 - its own
        return other

    def files(self) -> list[str]:
        """Names of all files."""
        return self._archive.namelist()

    def texts_with(self, word: str, files: Iterable[str]) -> list[str]:
        """Texts of those of the files that contain a word."""
        changed = [self._changes[path] for path in files if path in self._changes]
        others = (self._archive.read(path) for path in files if path not in self._changes)
        return changed + [content.decode() for content in others if word.encode() in content]

    def read(self, path: str) -> str:
        """Text of a file.

        Raises:
            Gone: there is no such file.

        """
        if path in self._changes:
            return self._changes[path]
        try:
            return self._archive.read(path).decode()
        except KeyError as error:
            message = f"no file {path}"
            raise Gone(message) from error

    def tree(self, path: str) -> ast.Module:
        """Syntax tree of a Python file."""
        return _parsed(self.read(path))

    def definition(self, path: str, name: str) -> Any:
        """Node of a class, function or assigned variable, or of `Class.member`.

        Raises:
            Gone: the file has none.

        """
        body: Iterable[ast.stmt] = self.tree(path).body
        for part in name.split("."):
            found = next((node for node in body if _names(node, part)), None)
            if found is None:
                message = f"no {name} in {path}"
                raise Gone(message)
            body = getattr(found, "body", ())
        return found

    def lifted(self, path: str, names: Iterable[str], namespace: dict[str, Any]) -> dict[str, Any]:
        """Execute some definitions of a file, without their decorators, in `namespace`."""
        nodes: list[ast.stmt] = []
        for name in names:
            node = copy.deepcopy(self.definition(path, name))
            node.decorator_list = []
            nodes.append(node)
        return execute(nodes, path, {"torch": torch} | namespace)


@functools.lru_cache(maxsize=64)
def _parsed(text: str) -> ast.Module:
    return ast.parse(text)


def execute(nodes: list[ast.stmt], path: str, namespace: dict[str, Any]) -> dict[str, Any]:
    """Execute statements of a wheel's file in `namespace`."""
    module = ast.fix_missing_locations(ast.Module(nodes, []))
    exec(compile(module, path, "exec", dont_inherit=True), namespace)  # noqa: S102 - a release's own pure functions
    return namespace


def _names(node: ast.stmt, name: str) -> bool:
    if isinstance(node, ast.Assign):
        return any(isinstance(target, ast.Name) and target.id == name for target in node.targets)
    if isinstance(node, ast.AnnAssign):
        return isinstance(node.target, ast.Name) and node.target.id == name
    return isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and node.name == name


def between(text: str, start: str, stop: str) -> str:
    """Text from the first `start` up to the next `stop`.

    Raises:
        Gone: there is no such passage.

    """
    begin = text.find(start)
    end = text.find(stop, begin + len(start))
    if begin < 0 or end < 0:
        message = f"no text from {start!r} to {stop!r}"
        raise Gone(message)
    return text[begin:end]


def signature(node: ast.FunctionDef) -> dict[str, str]:
    """Default of each parameter but `self`, as text; empty for none."""
    positional = [argument.arg for argument in node.args.args]
    defaults = [ast.unparse(default) for default in node.args.defaults]
    named = zip(positional, [""] * (len(positional) - len(defaults)) + defaults, strict=True)
    by_name = zip(node.args.kwonlyargs, node.args.kw_defaults, strict=True)
    found = dict(named) | {one.arg: ast.unparse(default) if default else "" for one, default in by_name}
    return {name: default for name, default in found.items() if name != "self"}
