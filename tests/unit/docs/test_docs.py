"""Documents: encoding, links, the index, the picture of the flow, and the commands and files that they show."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from distbench.case.resolve import load_case_file, resolve_case
from distbench.case.suite import load_suite
from distbench.cli.main import _parser

ROOT = Path(__file__).parents[3]
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


def shown_commands(page: Path) -> list[str]:
    """Commands of `distbench` in the indented blocks of a page, without pipes and comments."""
    text = re.sub(r"\\\n +", "", page.read_text(encoding="utf-8"))
    lines = re.findall(r"^    (distbench [a-z].*)$", text, re.MULTILINE)
    commands = [re.split(r" [|#] ", re.sub(r"  +#.*", "", line))[0] for line in lines]
    return [one for one in commands if not re.search(r"\bdistbench \w+:|\$LAYER|--nproc N$", one)]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_of_a_page_are_understood(page: Path) -> None:
    for command in shown_commands(page):
        assert _parser().parse_args(shlex.split(command)[1:]), command


def test_readme_shows_commands() -> None:
    assert len(shown_commands(ROOT / "README.md")) >= 20


def test_pre_commit_runs_what_make_check_runs() -> None:
    (repository,) = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))["repos"]
    hooks = {hook["entry"].removeprefix(".venv/bin/") for hook in repository["hooks"]}
    checks = re.findall(r"^check (.*)$", (ROOT / "scripts/check").read_text(encoding="utf-8"), re.MULTILINE)
    assert hooks == {re.sub(r" \S*[/*]\S*", "", check) for check in checks}


def test_make_help_lists_every_target_in_a_group() -> None:
    listed = subprocess.run(
        [shutil.which("make") or "make", "help"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    (phony,) = re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(re.findall(r"^  make (\S+)", listed, re.MULTILINE)) == sorted(phony.split())
    assert re.findall(r"^(\S.*):$", listed, re.MULTILINE) == ["Run", "On AMD nodes", "Develop", "Measure"]


@pytest.mark.parametrize("name", ["README.md", "docs/suites.md"])
def test_file_in_full_of_a_page_is_accepted(name: str, tmp_path: Path) -> None:
    (text,) = re.findall(r"^```toml\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    file = tmp_path / "file.toml"
    file.write_text(text, encoding="utf-8")
    if name == "README.md":
        assert resolve_case([load_case_file(str(file))], 8).case.limit == "max-recv-1"
    else:
        assert load_suite(str(file), 8)
