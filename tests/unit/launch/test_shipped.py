"""The launch files in the wheel, and `distbench init --launch`, which writes them out."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from distbench.cli import init
from distbench.cli.main import main
from tests.hosts import ROOT

LAUNCH = ROOT / "launch"
BUILD = "import setuptools.build_meta as backend; backend.build_wheel('made')"


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_wheel_holds_every_launch_file_and_every_file_of_a_package(tmp_path: Path) -> None:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "distbench", source / "distbench", symlinks=True, ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copytree(LAUNCH, source / "launch")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    subprocess.run([sys.executable, "-c", BUILD], cwd=source, check=True, capture_output=True)
    (wheel,) = (source / "made").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        content = {name: archive.read(name) for name in archive.namelist() if ".dist-info/" not in name}
        scripts = [one for one in archive.infolist() if one.filename.endswith((".sh", ".sbatch"))]
    assert content == {f"distbench/{name}": text for name, text in files_in(source / "distbench").items()} | {
        f"distbench/launch/{name}": text for name, text in files_in(LAUNCH).items()
    }
    assert len(scripts) == 2
    assert all(one.external_attr >> 16 & 0o111 for one in scripts)


def test_init_writes_the_launch_files_and_writes_over_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "launch"
    assert main(["init", "--launch", str(folder)]) == 0
    assert files_in(folder) == files_in(LAUNCH)
    assert os.access(folder / "torchrun.sh", os.X_OK)
    assert not os.access(folder / "ci" / "Jenkinsfile", os.X_OK)
    assert str(folder / "slurm.sbatch") in capsys.readouterr().out.splitlines()
    (folder / "ci" / "Jenkinsfile").unlink()
    assert main(["init", "--launch", str(folder)]) == 0
    assert files_in(folder) == files_in(LAUNCH)
    (folder / "slurm.sbatch").write_text("mine")
    (folder / "torchrun.sh").unlink()
    assert main(["init", "--launch", str(folder)]) == 2
    assert f"{folder / 'slurm.sbatch'}: there with other content; name another folder" in capsys.readouterr().err
    assert (folder / "slurm.sbatch").read_text() == "mine"
    assert not (folder / "torchrun.sh").exists()


def test_init_refuses_a_folder_that_cannot_be_made_and_an_installation_without_the_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    assert main(["init", "--launch", str(tmp_path / "file")]) == 2
    assert "name another folder" in capsys.readouterr().err
    monkeypatch.setattr(init, "_LAUNCH", "nowhere")
    assert main(["init", "--launch", str(tmp_path / "new")]) == 77
    assert "take the folder launch/ of distbench's repository" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
