"""A wheel of SGLang with the lifted files alone, their text as released or changed."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path

from distbench.callers.sglang.definitions import DEFINITIONS
from distbench.case.sglang_releases import NEWEST
from tests.contract.wheels import sglang_wheel

METADATA = f"sglang-{NEWEST}.dist-info/METADATA"
Changes = Mapping[str, tuple[str, str]]
"""New text by file: a passage that the file has once, and what replaces it."""


def slim_wheel(folder: Path, changes: Changes | None = None, name: str = "sglang") -> str:
    """Path of a wheel in `folder` with the newest release's lifted files; skips the test without a package index."""
    path = folder / f"{name}.whl"
    with sglang_wheel(NEWEST) as released, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as slim:
        for file in (METADATA, *DEFINITIONS):
            text = released.read(file).decode()
            if changes and file in changes:
                old, new = changes[file]
                assert text.count(old) == 1, (file, old, text.count(old))
                text = text.replace(old, new)
            slim.writestr(file, text)
    return str(path)
