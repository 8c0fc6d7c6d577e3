"""Documents: encoding, links, the index, and the picture of the flow."""

from __future__ import annotations

import re
import subprocess
import sys
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


PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)\s]*)?\)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_of_a_page_lead_to_files(page: Path) -> None:
    links = _LINK.findall(page.read_text(encoding="utf-8"))
    missing = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not missing


def test_index_lists_every_page_of_docs() -> None:
    index = ROOT / "docs" / "README.md"
    listed = {(index.parent / link).resolve() for link in _LINK.findall(index.read_text(encoding="utf-8"))}
    assert {page for page in PAGES if page.parent.is_relative_to(index.parent) and page != index} <= listed


def test_picture_of_the_flow_is_drawn_from_its_source(tmp_path: Path) -> None:
    drawn = tmp_path / "flow.svg"
    subprocess.run([sys.executable, str(ROOT / "scripts/draw_flow.py"), str(drawn)], check=True)
    assert (ROOT / "docs/flow.svg").read_bytes() == drawn.read_bytes(), "run scripts/draw_flow.py"
