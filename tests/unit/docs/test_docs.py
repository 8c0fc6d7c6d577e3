"""Documents: encoding, links, the index, the picture of the flow, and the commands and files that they show."""

from __future__ import annotations

import ast
import io
import re
import shlex
import shutil
import subprocess
import sys
import tokenize
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import msgspec
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


# Files of other projects that pages, docstrings and comments name.
OF_OTHERS = {
    "aiter/fused_moe.py": "aiter",
    "aiter/test_common.py": "aiter",
    "csrc/ck_gemm_moe_2stages_codegen/gen_instances.py": "aiter",
    "fused_moe.py": "aiter",
    "gen_instances.py": "aiter",
    "op_tests/test_moe_2stage.py": "aiter",
    "ops/quant.py": "aiter",
    "quant.py": "aiter",
    "atom/utils/envs.py": "ATOM",
    "mori_prepare_finalize.py": "ATOM",
    "deep_ep/utils/math.py": "DeepEP",
    "arg_groups/moe_hook.py": "SGLang",
    "tests/legacy/test_low_latency.py": "DeepEP",
    "environ.py": "SGLang",
    "moe_runner/aiter.py": "SGLang",
    "moriep.py": "SGLang",
    "test/registered/moe/test_fused_moe.py": "SGLang",
    "token_dispatcher/moriep.py": "SGLang",
    "batch_overlap/operations_strategy.py": "SGLang",
    "batch_overlap/two_batch_overlap.py": "SGLang",
    "all2all.py": "vLLM",
    "vllm/envs.py": "vLLM",
    "vllm/utils/serial_utils.py": "vLLM",
    "megatron/core/transformer/moe/router_trace.py": "Megatron-LM",
    "tests/kernels/moe/test_flashinfer_nvfp4_cosine_similarity.py": "vLLM",
    "tests/kernels/moe/test_moe.py": "vLLM",
}
# Pages of docs/measurements/ name files as they were at their date.
CURRENT_PAGES = [page for page in PAGES if page.parent.name != "measurements"]
SOURCES = [path for folder in ("distbench", "scripts", "tests") for path in (ROOT / folder).rglob("*.py")]
_FILE = re.compile(r"(?<![\w./{*-])[\w.-]+(?:/[\w.-]+)*\.py\b(?!\()")


def missing_files(text: str, *folders: Path) -> set[str]:
    """Python files that a text names, that no folder has, and that are not of another project."""
    named = set(_FILE.findall(text)) - OF_OTHERS.keys()
    return {name for name in named if not any((folder / name).is_file() for folder in folders)}


@cache
def named_in_sources() -> dict[Path, str]:
    """Docstrings and comments that name a Python file, by source."""
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    return {path: "\n".join(prose(text)) for path, text in texts.items() if _FILE.search(text)}


def prose(source: str) -> Iterator[str]:
    """Docstrings and comments of a Python source."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node) or ""
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            yield str(node.value.value)  # below an attribute
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.string


@pytest.mark.parametrize("page", CURRENT_PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_a_page_names_exist_in_the_root_or_in_distbench(page: Path) -> None:
    text = re.sub(r"^    .*$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE)  # commands and sketches
    assert not missing_files(text, ROOT, ROOT / "distbench")


def test_files_that_docstrings_and_comments_name_exist_in_the_root_in_distbench_or_beside_them() -> None:
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path, text in named_in_sources().items()
        for name in missing_files(text, ROOT, ROOT / "distbench", path.parent)
    }
    assert not missing


def test_a_file_that_was_moved_is_missing_where_a_text_names_it() -> None:
    text = "`passes.py`, `pipeline/passes.py`, distbench/case/spec.py, `aiter/fused_moe.py` and nodes/proof.py."
    assert missing_files(text, ROOT, ROOT / "distbench") == {"passes.py", "nodes/proof.py"}


def test_files_of_other_projects_are_named_somewhere_and_are_none_of_ours() -> None:
    texts = [*(page.read_text(encoding="utf-8") for page in CURRENT_PAGES), *named_in_sources().values()]
    named = {name for text in texts for name in _FILE.findall(text)}
    assert OF_OTHERS.keys() <= named
    assert not [name for name in OF_OTHERS if (ROOT / name).exists() or (ROOT / "distbench" / name).exists()]


def package_map() -> dict[str, str]:
    """Rows of the package map in docs/architecture.md, by package."""
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    return dict(re.findall(r"^\| `(\w+)/` \|(.*)$", text, re.MULTILINE))


def test_package_map_lists_every_module_of_every_package() -> None:
    found = {
        package.name: {path.stem for path in package.iterdir() if not path.name.startswith("__")}
        for package in (ROOT / "distbench").iterdir()
        if (package / "__init__.py").exists()
    }
    assert {name: set(re.findall(r"`(\w+)`", row)) for name, row in package_map().items()} == found


def test_sub_package_map_lists_every_module_of_a_sub_package() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `(\w+/\w+)/` \|(.*)$", text, re.MULTILINE)
    found = {
        f"{folder.parent.name}/{folder.name}": {path.stem for path in folder.iterdir() if path.name[:2] != "__"}
        for folder in (ROOT / "distbench").glob("*/*/")
        if (folder / "__init__.py").exists()
    }
    assert {name: set(re.findall(r"`(\w+)`", row)) for name, row in rows} == found


def test_package_map_has_the_order_of_the_import_contract() -> None:
    contracts = msgspec.toml.decode((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["importlinter"][
        "contracts"
    ]
    (layers,) = (contract["layers"] for contract in contracts if contract["type"] == "layers")
    packages = [name for layer in layers for name in layer.split(" | ")]
    assert [name for name in packages if (ROOT / "distbench" / name).is_dir()] == [*package_map()]


def test_reading_tour_has_seven_files() -> None:
    text = (ROOT / "docs/architecture.md").read_text(encoding="utf-8")
    tour = re.findall(r"^\d\. `([^`]+)`", text.partition("## Reading tour")[2].partition("## ")[0], re.MULTILINE)
    assert len(tour) == 7
    assert all((ROOT / "distbench" / name).is_file() for name in tour)


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
