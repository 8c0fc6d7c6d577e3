"""The installed package aiter: imported by one rank of a node first, and the tables that it reads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from distbench.experts.aiter import package
from distbench.experts.aiter.package import AiterPackage, tuned_tables

ROOT = Path(__file__).parents[4]
MODULES = ("aiter", "aiter/ops", "aiter/jit", "aiter/jit/utils")
FILES = ("aiter/fused_moe.py", "aiter/ops/shuffle.py", "aiter/jit/core.py", "aiter/jit/utils/chip_info.py")
COMPILES = """
import os, pathlib, time
began = time.monotonic()
time.sleep(0.2)
pathlib.Path(os.environ["TIMES"], str(os.getpid())).write_text(f"{began} {time.monotonic()}")
"""
IMPORTED = "from distbench.experts.aiter.package import load_package; print(load_package('aiter').version)"


def fake_aiter(folder: Path) -> Path:
    """Write a package with a slow import, and its metadata with a release."""
    for module in MODULES:
        (folder / module).mkdir(parents=True)
        (folder / module / "__init__.py").touch()
    for file in FILES:
        (folder / file).touch()
    (folder / "aiter" / "__init__.py").write_text(COMPILES)
    metadata = folder / "amd_aiter-0.1.20.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: amd-aiter\nVersion: 0.1.20\n")
    return folder


def test_one_rank_per_node_imports_aiter_while_the_others_wait(tmp_path: Path) -> None:
    site, times = fake_aiter(tmp_path / "site"), tmp_path / "times"
    times.mkdir()
    environ = os.environ | {"PYTHONPATH": f"{site}:{ROOT}", "TIMES": str(times), "AITER_JIT_DIR": str(tmp_path / "jit")}
    ranks = [subprocess.Popen([sys.executable, "-c", IMPORTED], env=environ, stdout=subprocess.PIPE) for _ in range(3)]
    assert [rank.communicate(timeout=60)[0] for rank in ranks] == [b"0.1.20\n"] * 3
    first, *others = sorted(tuple(map(float, path.read_text().split())) for path in times.iterdir())
    assert len(others) == 2
    assert all(began >= first[1] for began, _ in others)
    assert len(list((tmp_path / "jit").glob("distbench-*.built"))) == 1


def test_build_folder_is_that_of_aiter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = fake_aiter(tmp_path / "site")
    monkeypatch.syspath_prepend(site)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert package._build_folder({"AITER_JIT_DIR": str(tmp_path / "own")}) == tmp_path / "own"  # noqa: SLF001
    assert package._build_folder({}) == site / "aiter" / "jit"  # noqa: SLF001
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert package._build_folder({}) == tmp_path / ".aiter"  # noqa: SLF001
    (tmp_path / ".aiter" / "jit").mkdir()
    assert package._build_folder({}) == tmp_path / ".aiter" / "jit"  # noqa: SLF001


def test_merged_kernel_tables_are_reported_with_their_sources(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site = fake_aiter(tmp_path / "site")
    configs = site / "aiter" / "configs"
    (configs / "model_configs").mkdir(parents=True)
    (configs / "tuned_fmoe.csv").write_text("a,b\n1,2\n")
    (configs / "model_configs" / "one_tuned_fmoe.csv").write_text("a,b\n3,4\n5,6\n")
    (configs / "model_configs" / "one_untuned_fmoe.csv").write_text("a,b\n")
    merged = tmp_path / "merged.csv"
    merged.write_text("a,b\n1,2\n3,4\n5,6\n")
    monkeypatch.syspath_prepend(site)
    monkeypatch.delenv("AITER_CONFIG_FMOE", raising=False)
    core = type("core", (), {"AITER_CONFIG_FMOE_FILE": str(merged)})
    real = AiterPackage("0.1.20", type("root", (), {"__name__": "aiter"})(), None, None, core, None)
    found = tuned_tables(real)
    assert [(Path(one.path).name, one.rows) for one in found.sources] == [
        ("tuned_fmoe.csv", 1),
        ("one_tuned_fmoe.csv", 2),
    ]
    assert [(one.path, one.rows) for one in found.read] == [(str(merged), 3)]
    assert len({one.sha256 for one in (*found.sources, *found.read)}) == 3
    core.AITER_CONFIG_FMOE_FILE = str(tmp_path / "gone.csv")  # type: ignore[attr-defined]
    (gone,) = tuned_tables(real).read
    assert (gone.sha256, gone.rows) == ("", None)
