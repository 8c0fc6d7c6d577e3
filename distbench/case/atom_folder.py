"""The folder with ATOM's text: the files that are read, and their digest, which stands for a release."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from distbench.case.table_file import open_regular
from distbench.errors import InvalidCase
from distbench.utils.text import one_line

KERNEL = "atom/model_ops/fused_moe/modular_kernel.py"
PREPARE = "atom/model_ops/fused_moe/mori_prepare_finalize.py"
PLUGIN_CONFIG = "atom/plugin/config.py"
PLUGIN = "atom/plugin/vllm/mori_patch.py"
_PACKAGE = "atom"
MOST_BYTES = 4 << 20
"""Largest source file that is read."""


def folder_digest(folder: str) -> str:
    """SHA-256 over the names and contents of the files that are read, as 64 hex digits; empty without a folder.

    Raises:
        InvalidCase: the folder has no package of ATOM, or a file is unreadable or larger than 4 MiB.

    """
    if not folder:
        return ""
    if "\0" in folder or not (Path(folder) / _PACKAGE).is_dir():
        message = f"caller_folder = {folder!r:.200}: has no folder {_PACKAGE}; give a checkout of ATOM"
        raise InvalidCase(message)
    digest = hashlib.sha256()
    for path in (KERNEL, PREPARE, PLUGIN_CONFIG, PLUGIN):
        for part in (path.encode(), _content(folder, path)):
            digest.update(len(part).to_bytes(8, "big") + part)
    return digest.hexdigest()


def _content(folder: str, path: str) -> bytes:
    try:
        with os.fdopen(open_regular(str(Path(folder) / path)), "rb") as stream:
            content = stream.read(MOST_BYTES + 1)
    except FileNotFoundError:
        return b""  # refused by name where it is lifted
    except (OSError, ValueError) as error:
        message = f"caller_folder = {folder!r:.200}: {path} cannot be read ({one_line(error):.200}); give a checkout"
        raise InvalidCase(message) from error
    if len(content) > MOST_BYTES:
        message = f"caller_folder = {folder!r:.200}: {path} is larger than {MOST_BYTES >> 20} MiB; give a checkout"
        raise InvalidCase(message)
    return content
