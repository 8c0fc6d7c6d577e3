"""Path of the tuned table, and the folder of compiled modules."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from distbench.experts.aiter.emulated.quirks import assumed


def get_user_jit_dir() -> str:
    """Return AITER_JIT_DIR, created if missing, or a folder of this user's."""
    folder = Path(os.environ.get("AITER_JIT_DIR") or f"{tempfile.gettempdir()}/distbench-{os.getuid()}-aiter-emulated")
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder)


def __getattr__(name: str) -> str:
    if name == "AITER_CONFIG_FMOE_FILE":
        return assumed().table
    raise AttributeError(name)
