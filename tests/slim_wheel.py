"""Texts of callers for tests, with the lifted files alone, as released or changed, or synthetic.

SGLang's wheel comes from the package index. vLLM's, 340 MB, and ATOM's checkout are read where a variable names one;
`tests/synthetic_vllm.py` and `tests/synthetic_atom.py` stand for them on machines without.
"""

from __future__ import annotations

import os
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest

from distbench.callers.sglang.definitions import DEFINITIONS
from distbench.callers.vllm.definitions import DEFINITIONS as VLLM_DEFINITIONS
from distbench.case.sglang_releases import NEWEST
from tests import synthetic_atom, synthetic_vllm
from tests.contract.wheels import sglang_wheel

METADATA = f"sglang-{NEWEST}.dist-info/METADATA"
VLLM_WHEEL, ATOM_FOLDER = "DISTBENCH_VLLM_WHEEL", "DISTBENCH_ATOM_FOLDER"
VLLM_RELEASE = "0.33.0"
Changes = Mapping[str, tuple[str, str]]
"""New text by file: a passage that the file has once, and what replaces it."""


def slim_wheel(folder: Path, changes: Changes | None = None, name: str = "sglang") -> str:
    """Path of a wheel in `folder` with the newest release's lifted files; skips the test without a package index."""
    with sglang_wheel(NEWEST) as released:
        return _slim(folder, (METADATA, *DEFINITIONS), lambda file: released.read(file).decode(), changes, name)


def vllm_wheel(folder: Path, changes: Changes | None = None, *, released: bool = False) -> str:
    """Path of a wheel in `folder` with vLLM's lifted files: synthetic, or those of `DISTBENCH_VLLM_WHEEL`.

    Skips the test where released text is asked for and the variable is not set.
    """
    if released:
        with zipfile.ZipFile(named(VLLM_WHEEL)) as wheel:
            metadata = f"vllm-{VLLM_RELEASE}.dist-info/METADATA"
            return _slim(folder, (metadata, *VLLM_DEFINITIONS), lambda file: wheel.read(file).decode(), changes, "vllm")
    version = synthetic_vllm.VERSION
    metadata = f"vllm-{version}.dist-info/METADATA"
    text = {metadata: f"Name: vllm\nVersion: {version}\n"} | synthetic_vllm.TEXT
    return _slim(folder, tuple(text), text.__getitem__, changes, "vllm")


def atom_folder(folder: Path, changes: Changes | None = None, *, released: bool = False) -> str:
    """A folder inside `folder` with ATOM's lifted files: synthetic, or of `DISTBENCH_ATOM_FOLDER`, else a skip."""
    text = synthetic_atom.TEXT
    if released:
        checkout = Path(named(ATOM_FOLDER))
        text = {file: (checkout / file).read_text() for file in text}
    for file, content in text.items():
        (folder / "ATOM" / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / "ATOM" / file).write_text(_changed(file, content, changes))
    return str(folder / "ATOM")


def named(variable: str) -> str:
    """The path in `variable`; skips the test where it is not set."""
    path = os.environ.get(variable, "")
    if not path:
        pytest.skip(f"{variable} is not set, and the text that it names is not part of distbench")
    return path


def _slim(folder: Path, files: tuple[str, ...], read: Callable[[str], str], changes: Changes | None, name: str) -> str:
    path = folder / f"{name}.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as slim:
        for file in files:
            slim.writestr(file, _changed(file, read(file), changes))
    return str(path)


def _changed(file: str, text: str, changes: Changes | None) -> str:
    if not changes or file not in changes:
        return text
    old, new = changes[file]
    assert text.count(old) == 1, (file, old, text.count(old))
    return text.replace(old, new)
