"""The text of documents and sources is UTF-8 as it was meant."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TEXTS = [
    *ROOT.glob("*.md"),
    *(path for folder in ("docs", "distbench", "launch", "scripts") for path in (ROOT / folder).rglob("*")),
]
SUFFIXES = {".md", ".py", ".toml", ".yaml", ".sbatch"}
# UTF-8 that was read as Latin-1: the first bytes of two and three as letters, the others as C1 control characters.
_MOJIBAKE = re.compile("[\\xc2-\\xef][\\x80-\\xbf]|[\\x80-\\x9f]")


@pytest.mark.parametrize("path", [path for path in TEXTS if path.suffix in SUFFIXES], ids=str)
def test_no_text_file_holds_doubly_decoded_utf8(path: Path) -> None:
    assert not _MOJIBAKE.findall(path.read_text(encoding="utf-8"))
