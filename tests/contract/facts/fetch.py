"""Wheels of released packages: downloaded by pip and kept, never installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from packaging.utils import parse_wheel_filename
from packaging.version import Version

CACHE = Path(os.environ.get("DISTBENCH_TEST_CACHE", Path(tempfile.gettempdir()) / "distbench-wheels"))
_UNREACHABLE = re.compile(
    r"No module named pip|connection broken|NewConnectionError|ConnectTimeout|Max retries exceeded"
    r"|not a trusted or secure host|Failed to establish|Name or service not known"
    r"|Temporary failure in name resolution|Network is unreachable",
    re.IGNORECASE,
)
_PLATFORMS = tuple(f"manylinux_2_{minor}_x86_64" for minor in range(45, 16, -1))
_SECONDS = 300


class Unreachable(OSError):
    """pip reaches no package index."""


@dataclass(frozen=True)
class Distribution:
    """A name on the package index whose wheels hold `package`, and the Python that its wheels are for."""

    name: str
    package: str
    python: str = "3.12"
    pre: bool = False
    """Whether all its versions are pre-releases."""


MORI = Distribution("amd-mori", "mori")
NIGHTLY = Distribution("amd-mori-nightly", "mori", pre=True)
SGLANG = Distribution("sglang", "sglang", python="3.11")
AITER = Distribution("amd-aiter", "aiter", pre=True)
VLLM = Distribution("vllm", "vllm")
DEEP_EP = Distribution("sgl-deep-ep", "deep_ep")

PINNED = {
    MORI: "1.2.4",
    NIGHTLY: "1.2.5.dev20261026",
    SGLANG: "0.5.23",
    AITER: "0.1.7.post2.dev18",
    VLLM: "0.33.0",
    DEEP_EP: "0.1.2.post1",
}
"""The versions whose text distbench was written against, and that the contract tests read."""


def pinned(one: Distribution, version: str = "") -> Path:
    """Wheel of `version`, of the pinned one for "", in the cache; downloaded where it is missing there.

    Raises:
        Unreachable: there is no package index within reach.
        OSError: pip failed otherwise.

    """
    wanted = Version(version or PINNED[one])
    for path in sorted(CACHE.glob("*.whl")):
        if _named(path) == (one.name, wanted):
            return path
    return download(one, CACHE, f"=={wanted}")


def newest_in(folder: Path, one: Distribution) -> Path | None:
    """The newest wheel of a distribution in a folder; None without one."""
    found = [(parsed[1], path) for path in folder.glob("*.whl") if (parsed := _named(path)) and parsed[0] == one.name]
    return max(found)[1] if found else None


def download(one: Distribution, folder: Path, constraint: str = "") -> Path:
    """Wheel that pip finds newest under a version constraint, in `folder`.

    Raises:
        Unreachable: there is no package index within reach.
        OSError: pip failed otherwise, or took more than five minutes.

    """
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--timeout=20"]
        command += ["--retries=1", "--disable-pip-version-check", f"--python-version={one.python}", "-d", scratch]
        command += [f"--platform={platform}" for platform in _PLATFORMS] + ["--pre"] * one.pre
        try:
            done = subprocess.run(
                [*command, f"{one.name}{constraint}"], capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            message = f"pip download {one.name}: not done within {_SECONDS} s"
            raise OSError(message) from error
        if done.returncode and (_UNREACHABLE.search(done.stderr) or "PIP_NO_INDEX" in os.environ):
            message = f"pip download {one.name}: no package index within reach"
            raise Unreachable(message)
        if done.returncode:
            message = f"pip download {one.name}: {done.stderr.strip().splitlines()[-1:]}"
            raise OSError(message)
        (wheel,) = Path(scratch).glob("*.whl")
        return wheel.replace(folder / wheel.name)


def _named(path: Path) -> tuple[str, Version] | None:
    try:
        name, version, _, _ = parse_wheel_filename(path.name)
    except ValueError:  # no wheel's name
        return None
    return str(name), version
