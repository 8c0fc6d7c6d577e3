"""Environment of a report: commits of distbench only, and the system in one section."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from distbench.report import environment
from distbench.report.environment import capture_environment, container_image, own_commit

ROOT = Path(__file__).parents[3]
_WHO = ("-c", "user.name=someone", "-c", "user.email=someone@example.org")


def git(folder: Path, *arguments: str) -> str:
    command = ["git", "-C", str(folder), *_WHO, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def repository(folder: Path, name: str) -> str:
    """Create a repository of a project of this name; return its HEAD."""
    folder.mkdir()
    (folder / "pyproject.toml").write_text(f'[project]\nname = "{name}"\n')
    git(folder, "init", "-q")
    git(folder, "add", "-A")
    git(folder, "commit", "-qm", "first")
    return git(folder, "rev-parse", "HEAD")


def test_commit_is_that_of_the_own_checkout_and_marks_changed_files_as_dirty(tmp_path: Path) -> None:
    top = tmp_path / "checkout"
    head = repository(top, "distbench")
    assert own_commit(top) == head
    with (top / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    assert own_commit(top) == f"{head}-dirty"


@pytest.mark.parametrize("inside", [".venv/lib/python3.12/site-packages", "."])
def test_head_of_a_repository_around_distbench_is_not_its_commit(tmp_path: Path, inside: str) -> None:
    top = tmp_path / "theirs"
    head = repository(top, "their-project")
    folder = top / inside
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "distbench").symlink_to(ROOT / "distbench")
    assert head
    assert own_commit(folder) == ""


def test_commit_of_an_installation_in_another_repository_is_not_recorded(tmp_path: Path) -> None:
    site = tmp_path / "theirs"
    head = repository(site, "their-project")
    code = "from distbench.report.environment import own_commits; print(own_commits(), end='')"
    shutil.copytree(ROOT / "distbench", site / "distbench")
    done = subprocess.run(
        [sys.executable, "-I", "-c", f"import sys; sys.path.insert(0, {str(site)!r}); {code}"],
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert head not in done.stdout
    assert done.stdout == "{}"


def test_container_image_comes_from_the_launcher_or_the_runtime(tmp_path: Path) -> None:
    podman, docker = tmp_path / "containerenv", tmp_path / "dockerenv"
    assert container_image({}, podman, docker) == ""
    assert container_image({"KUBERNETES_SERVICE_HOST": "10.0.0.1"}, podman, docker) == "unknown"
    docker.touch()
    assert container_image({}, podman, docker) == "unknown"
    podman.write_text('engine="podman-5"\nimage="docker.io/rocm/sgl-dev:v0.5"\n')
    assert container_image({}, podman, docker) == "docker.io/rocm/sgl-dev:v0.5"
    assert container_image({"APPTAINER_CONTAINER": "/images/a.sif"}, podman, docker) == "/images/a.sif"
    assert container_image({"DISTBENCH_IMAGE": "own:1", "APPTAINER_CONTAINER": "b"}, podman, docker) == "own:1"


@pytest.mark.parametrize(
    "module", ["x86_64 Kernel Module  570.124.06  Wed", "Open Kernel Module for x86_64  570.124.06  R"]
)
def test_environment_holds_system_and_driver_versions_in_one_section(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, module: str
) -> None:
    files = {
        "_ROCM": "7.0.2-56\n",
        "_NVIDIA": f"NVRM version: NVIDIA UNIX {module} Feb 26 01:58:57 UTC 2025\n",
        "_AMDGPU": "6.14.14\n",
        "_OS_RELEASE": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.3 LTS"\n',
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)
        monkeypatch.setattr(environment, name, tmp_path / name)
    versions = {"amd-mori-nightly": "1.2.4.dev3", "amd-aiter": "0.1.14"}
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: versions[name] if name in versions else missing(name)
    )
    environment.software_versions.cache_clear()
    environment.system_facts.cache_clear()
    try:
        found = capture_environment({"DISTBENCH_IMAGE": "own:1"}, ["b", "a", "b"], [])
    finally:
        environment.software_versions.cache_clear()
        environment.system_facts.cache_clear()
    assert found.hosts == ["a", "b"]
    assert {"rocm": "7.0.2-56", "mori": "1.2.4.dev3", "aiter": "0.1.14"}.items() <= found.versions.items()
    assert {"distbench", "python", "torch"} <= found.versions.keys()
    assert "triton" not in found.versions
    assert found.system["kernel"]
    assert {
        "os": "Ubuntu 24.04.3 LTS",
        "nvidia_driver": "570.124.06",
        "amdgpu_driver": "6.14.14",
        "container_image": "own:1",
    }.items() <= found.system.items()


def missing(name: str) -> str:
    raise importlib.metadata.PackageNotFoundError(name)
