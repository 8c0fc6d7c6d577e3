"""Released wheels, downloaded once and read, never installed."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

CACHE = Path(os.environ.get("DISTBENCH_TEST_CACHE", Path(tempfile.gettempdir()) / "distbench-wheels"))
UNREACHABLE = re.compile(
    r"No module named pip|connection broken|NewConnectionError|ConnectTimeout|Max retries exceeded"
    r"|not a trusted or secure host|Failed to establish|Name or service not known"
    r"|Temporary failure in name resolution|Network is unreachable",
    re.IGNORECASE,
)


def aiter_wheel(version: str) -> zipfile.ZipFile:
    """Wheel of amd-aiter; the test is skipped only without a package index."""
    path = CACHE / f"amd_aiter-{version}-py3-none-any.whl"
    if not path.exists():
        _download(path, f"amd-aiter=={version}")
    return zipfile.ZipFile(path)


def sglang_wheel(version: str) -> zipfile.ZipFile:
    """Wheel of SGLang; the test is skipped only without a package index."""
    path = CACHE / f"sglang-{version}-cp311-cp311-manylinux_2_34_x86_64.whl"
    if not path.exists():
        _download(path, f"sglang=={version}", "--python-version=3.11", "--platform=manylinux_2_34_x86_64")
    return zipfile.ZipFile(path)


def _download(path: Path, requirement: str, *more: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--timeout=20"]
        command += ["--retries=1", "--disable-pip-version-check", "-d", scratch, *more, requirement]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
        if done.returncode and (UNREACHABLE.search(done.stderr) or "PIP_NO_INDEX" in os.environ):
            pytest.skip("no package index within reach of pip")
        assert done.returncode == 0, done.stderr
        (Path(scratch) / path.name).replace(path)


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
