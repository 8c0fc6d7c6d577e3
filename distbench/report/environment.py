"""Where a run took place: an allow-list of what can change a result, never the whole environment."""

from __future__ import annotations

import platform
import subprocess
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import msgspec

from distbench import __version__
from distbench.production import recorded_environment

_GIT_SECONDS = 5


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """Hosts and devices of the ranks, versions and commits of what ran, and the variables that may change results."""

    hosts: list[str]
    devices: list[str]
    versions: dict[str, str]
    commits: dict[str, str]
    variables: dict[str, str]


def capture_environment(environ: Mapping[str, str], hosts: list[str], devices: list[str]) -> Environment:
    """Describe this process's software; `hosts` and `devices` are those of the ranks, each named once."""
    return Environment(
        hosts=sorted(set(hosts)),
        devices=sorted(set(devices)),
        versions=_versions(),
        commits=_commits(),
        variables=recorded_environment(environ),
    )


@lru_cache(maxsize=1)
def _versions() -> dict[str, str]:
    import torch  # noqa: PLC0415 - only where a rank has it loaded anyway

    found = {"distbench": __version__, "python": platform.python_version(), "torch": str(torch.__version__)}
    for name in ("cuda", "hip"):
        version = getattr(torch.version, name, None)
        if version:
            found[name] = version
    return found


@lru_cache(maxsize=1)
def _commits() -> dict[str, str]:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_GIT_SECONDS, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return {}
    return {"distbench": done.stdout.strip()} if done.returncode == 0 else {}
