"""Released wheels, downloaded once and read, never installed."""

from __future__ import annotations

import ast
import zipfile
from typing import Any

import pytest
import torch

from tests.contract.facts.fetch import AITER, DEEP_EP, MORI, SGLANG, Distribution, Unreachable, pinned


def aiter_wheel(version: str) -> zipfile.ZipFile:
    """Wheel of amd-aiter; the test is skipped only without a package index."""
    return _wheel(AITER, version)


def mori_wheel(version: str) -> zipfile.ZipFile:
    """Wheel of amd-mori; the test is skipped only without a package index."""
    return _wheel(MORI, version)


def sglang_wheel(version: str) -> zipfile.ZipFile:
    """Wheel of SGLang; the test is skipped only without a package index."""
    return _wheel(SGLANG, version)


def deep_ep_wheel(version: str = "") -> zipfile.ZipFile:
    """Wheel of sgl-deep-ep, the pinned one for ""; the test is skipped only without a package index."""
    return _wheel(DEEP_EP, version)


def _wheel(distribution: Distribution, version: str) -> zipfile.ZipFile:
    try:
        return zipfile.ZipFile(pinned(distribution, version))
    except Unreachable:
        pytest.skip("no package index within reach of pip")


def tree(wheel: zipfile.ZipFile, path: str) -> ast.Module:
    return ast.parse(wheel.read(path))


def function(module: ast.Module, name: str) -> ast.FunctionDef:
    return next(node for node in module.body if isinstance(node, ast.FunctionDef) and node.name == name)


def lifted(wheel: zipfile.ZipFile, path: str, names: tuple[str, ...], namespace: dict[str, Any]) -> dict[str, Any]:
    """Execute some functions of the wheel's source in `namespace`."""
    nodes: list[ast.stmt] = []
    for name in names:
        node = function(tree(wheel, path), name)
        node.decorator_list = []
        nodes.append(node)
    namespace |= {"torch": torch}
    exec(compile(ast.Module(nodes, []), path, "exec"), namespace)  # noqa: S102 - a release's own pure functions
    return namespace
