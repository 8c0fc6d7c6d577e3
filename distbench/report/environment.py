"""Environment of a run: an allow-list of facts that can change a result, never the whole environment."""

from __future__ import annotations

import contextlib
import json
import platform
import re
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import msgspec

from distbench import __version__
from distbench.case.sglang_env import recorded_environment

PACKAGES = {
    "mori": ("amd-mori", "amd-mori-nightly"),
    "aiter": ("amd-aiter",),
    "triton": ("triton", "pytorch-triton-rocm", "pytorch-triton"),
    "deep_ep": ("sgl-deep-ep", "deep-ep", "deep_ep"),
    "vllm": ("vllm",),
    "sglang": ("sglang",),
}
"""Distributions of the packages whose versions are recorded where they are installed; the first one found counts."""

IMAGE = "DISTBENCH_IMAGE"
"""Variable by which a launcher names the container image; Docker itself leaves no name inside a container."""

_GIT_SECONDS = 5
_IMAGE_VARIABLES = (IMAGE, "APPTAINER_CONTAINER", "SINGULARITY_CONTAINER")
_PODMAN, _DOCKER = Path("/run/.containerenv"), Path("/.dockerenv")
_OS_RELEASE = Path("/etc/os-release")
_ROCM = Path("/opt/rocm/.info/version")
_NVIDIA, _AMDGPU = Path("/proc/driver/nvidia/version"), Path("/sys/module/amdgpu/version")
_NVIDIA_VERSION = re.compile(r"Kernel Module.*?\s(\d+(?:\.\d+)+)\s")


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Hosts and devices of the ranks, versions and commits of the software, and variables that may change results.

    `system` holds rank 0's kernel, operating system, drivers and container image, where readable.
    """

    hosts: list[str]
    devices: list[str]
    versions: dict[str, str]
    commits: dict[str, str]
    variables: dict[str, str]
    system: dict[str, str] = {}


NO_ENVIRONMENT = Environment(hosts=[], devices=[], versions={}, commits={}, variables={})


def capture_environment(environ: Mapping[str, str], hosts: list[str], devices: list[str]) -> Environment:
    """Describe this process's software; `hosts` and `devices` are those of the ranks, each named once."""
    image = container_image(environ)
    return Environment(
        hosts=sorted(set(hosts)),
        devices=sorted(set(devices)),
        versions=software_versions(),
        commits=own_commits(),
        variables=recorded_environment(environ),
        system=system_facts() | ({"container_image": image} if image else {}),
    )


def container_image(environ: Mapping[str, str], podman: Path = _PODMAN, docker: Path = _DOCKER) -> str:
    """Name of this process's container image; `unknown` in a container that does not name it, empty outside of one.

    Podman writes the name into /run/.containerenv, Apptainer into a variable.
    """
    for name in _IMAGE_VARIABLES:
        if environ.get(name):
            return environ[name]
    for line in _text(podman).splitlines():
        key, _, value = line.partition("=")
        if key == "image" and value.strip('"'):
            return value.strip('"')
    inside = docker.exists() or podman.exists() or "KUBERNETES_SERVICE_HOST" in environ
    return "unknown" if inside else ""


@lru_cache(maxsize=1)
def software_versions() -> dict[str, str]:
    """Versions of distbench, Python, torch and its build, ROCm, and PACKAGES, where present."""
    import torch  # noqa: PLC0415 - only where a rank has it loaded anyway

    found = {"distbench": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("cuda", "hip"):
        version = getattr(torch.version, name, None)
        if version:
            found[name] = version
    rocm = _text(_ROCM)
    return found | ({"rocm": rocm} if rocm else {}) | package_versions()


def package_versions() -> dict[str, str]:
    """Versions of PACKAGES that are installed, by the name that they are imported by."""
    import importlib.metadata  # noqa: PLC0415 - rank 0 alone asks, once

    found: dict[str, str] = {}
    for package, distributions in PACKAGES.items():
        for distribution in distributions:
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                found.setdefault(package, importlib.metadata.version(distribution))
    return found


@lru_cache(maxsize=1)
def system_facts() -> dict[str, str]:
    """Kernel, operating system and drivers of this machine, where readable."""
    nvidia = _NVIDIA_VERSION.search(_text(_NVIDIA))
    name = re.search(r'^PRETTY_NAME="?([^"\n]*)', _text(_OS_RELEASE), re.MULTILINE)
    facts = {
        "kernel": platform.release(),
        "os": name[1] if name else "",
        "nvidia_driver": nvidia[1] if nvidia else "",
        "amdgpu_driver": _text(_AMDGPU),
    }
    return {key: value for key, value in facts.items() if value}


@lru_cache(maxsize=1)
def own_commits() -> dict[str, str]:
    """Commits by package: of distbench's own checkout, or the one that it was installed from."""
    commit = own_commit(Path(__file__).resolve().parents[2]) or _installed_commit()
    return {"distbench": commit} if commit else {}


def own_commit(root: Path) -> str:
    """Commit of the checkout of distbench whose top is `root`, with `-dirty` appended where tracked files are changed.

    Empty where `root` is no such top: an installed copy, or one inside another repository, has that repository's HEAD
    above it, which says nothing about distbench.
    """
    project = re.search(r"^name\s*=\s*[\"']([^\"']*)", _text(root / "pyproject.toml"), re.MULTILINE)
    if not (root / ".git").exists() or project is None or project[1] != "distbench":
        return ""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _installed_commit() -> str:
    """Commit that pip installed distbench from, as PEP 610 records it; empty for an index or a folder."""
    import importlib.metadata  # noqa: PLC0415 - see above

    with contextlib.suppress(importlib.metadata.PackageNotFoundError, ValueError, AttributeError):
        origin = json.loads(importlib.metadata.distribution("distbench").read_text("direct_url.json") or "{}")
        return str(origin.get("vcs_info", {}).get("commit_id", ""))
    return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace").strip()
    except OSError:
        return ""
