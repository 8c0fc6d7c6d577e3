"""Facts of this node that decide which cases can run on it. Changes nothing, and starts only small tools."""

from __future__ import annotations

import importlib.metadata
import os
import resource
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from distbench.case.plugins import FAULT, KINDS, installed
from distbench.errors import InvalidCase
from distbench.launcher.locks import DEVICE_LOCKS, is_held
from distbench.launcher.nodes.interfaces import interface_names
from distbench.report.environment import PACKAGES
from distbench.utils.devices import compute_units

_ROCM = Path("/opt/rocm")
_NICS = Path("/sys/class/infiniband")
_SHARED_MEMORY = Path("/dev/shm")  # noqa: S108 - its size is looked at
MORI = PACKAGES["mori"]
(AITER,) = PACKAGES["aiter"]


class Node(msgspec.Struct, frozen=True, kw_only=True):
    """Facts; a missing text is empty and a missing number None. Sizes in bytes."""

    torch: str = ""
    """Version of torch, or the reason why it cannot be imported, with `!` in front."""
    flavour: str = ""
    """cpu, cuda or rocm."""
    devices: tuple[str, ...] = ()
    """Architecture of each accelerator: gfx942, sm_90."""
    peers: bool | None = None
    """Whether every accelerator can access every other one's memory."""
    rocm: str = ""
    hipcc: str = ""
    units: int | None = None
    """Compute units of each accelerator, where ROCm's kernel driver lists them."""
    packages: dict[str, str] = {}
    """Versions of mori's two distributions and of aiter's, where installed."""
    plugins: tuple[str, ...] = ()
    """Installed plugins with their packages, none of them loaded."""
    nics: dict[str, str] = {}
    """State of each RDMA device's first port, such as ACTIVE."""
    memlock: int | None = None
    """Limit of locked memory; None: unlimited."""
    open_files: int = 0
    shm_total: int = 0
    shm_free: int = 0
    interfaces: tuple[str, ...] = ()
    """Network interfaces that have an address."""
    locks: tuple[str, ...] = ()
    """Locks of benches that run on this node now."""
    environ: dict[str, str] = {}


def probe(environ: Mapping[str, str] = os.environ) -> Node:
    """Facts of this node."""
    shm = shutil.disk_usage(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None
    memlock = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]
    return Node(
        **_torch_facts(),
        rocm=_text(_ROCM / ".info" / "version"),
        hipcc=shutil.which("hipcc") or "",
        units=compute_units(environ),
        packages={name: _version(name) for name in (*MORI, AITER) if _version(name)},
        plugins=tuple(_plugins()),
        nics={nic.name: _port_state(nic) for nic in sorted(_NICS.glob("*"))},
        memlock=None if memlock == resource.RLIM_INFINITY else memlock,
        open_files=resource.getrlimit(resource.RLIMIT_NOFILE)[0],
        shm_total=shm.total if shm else 0,
        shm_free=shm.free if shm else 0,
        interfaces=interface_names(),
        locks=tuple(held_locks()),
        environ=dict(environ),
    )


def _plugins() -> Iterator[str]:
    for part in (*KINDS, FAULT):
        for name, entry in sorted(installed(part).items()):
            package = f" ({entry.dist.name} {entry.dist.version})" if entry.dist else ""
            yield f"{part} {name}{package}"


def held_locks(folder: Path = DEVICE_LOCKS) -> list[str]:
    """File names of the accelerators' locks in `folder` that a process holds, or that cannot be read."""
    return [found for path in sorted(folder.glob("distbench-*.lock")) if (found := _held_lock(path))]


def _held_lock(path: Path) -> str:
    try:
        return path.name if is_held(path) else ""
    except InvalidCase as error:
        return f"{path.name} ({error})"


def _torch_facts() -> dict[str, Any]:
    try:
        import torch  # noqa: PLC0415 - a broken one is a finding
    except Exception as error:  # noqa: BLE001 - whatever a broken installation raises
        return {"torch": f"! {type(error).__name__}: {' '.join(str(error).split())[:120]}"}
    flavour = "rocm" if torch.version.hip else "cuda" if torch.version.cuda else "cpu"
    facts: dict[str, Any] = {"torch": str(torch.__version__), "flavour": flavour}
    if flavour != "cpu" and torch.cuda.is_available():
        count = torch.cuda.device_count()
        facts["devices"] = tuple(_architecture(torch.cuda.get_device_properties(index)) for index in range(count))
        pairs = [(first, second) for first in range(count) for second in range(count) if first != second]
        facts["peers"] = all(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
    return facts


def _architecture(properties: Any) -> str:
    name = getattr(properties, "gcnArchName", "")
    return str(name).split(":")[0] if str(name).startswith("gfx") else f"sm_{properties.major}{properties.minor}"


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _port_state(nic: Path) -> str:
    return _text(nic / "ports" / "1" / "state").partition(":")[2].strip() or "unknown"


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
