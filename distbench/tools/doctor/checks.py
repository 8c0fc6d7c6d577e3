"""The checks that hold for any node: torch, accelerators, links, limits, shared memory, names, locks."""

from __future__ import annotations

import msgspec

from distbench.case.sglang_env import near_misses
from distbench.case.spec import Case
from distbench.launcher.nodes.interfaces import VARIABLES, interface_complaints
from distbench.launcher.unused_variables import unused_variables
from distbench.tools.doctor.findings import PATHS, Fact, Level, Path
from distbench.tools.doctor.probe import Node
from distbench.tools.doctor.vendors import Network, check_vendors

_OPEN_FILES = 4096
_SHM_PER_RANK = 64 << 20
_MIN_TORCH = (2, 9)
_DEVICE_PATHS: tuple[Path, ...] = ("cuda", "mori")


def check_node(node: Node, case: Case, network: Network) -> list[Fact]:
    """Findings about `node` for `case`, the largest one to run, and for `network`."""
    ranks = case.ep_size // network.nodes
    return [
        _torch(node),
        *_accelerators(node, ranks),
        _peers(node),
        *check_vendors(node, case, network),
        _open_files(node),
        _shared_memory(node, ranks),
        *_interfaces(node),
        *_names(node),
        *_unused(node, case),
        *_locks(node),
        Fact(topic="plugins", level="ok", found=", ".join(node.plugins) or "none is installed"),
    ]


def _torch(node: Node) -> Fact:
    if not node.torch or node.torch.startswith("!"):
        found = node.torch[2:] or "not installed"
        return Fact(topic="torch", level="missing", found=found, fix="install torch for this machine: make setup")
    release = tuple(int(part) for part in node.torch.split("+")[0].split(".")[:2] if part.isdigit())
    if release < _MIN_TORCH:
        return Fact(topic="torch", level="degraded", found=node.torch, fix="take torch 2.9 or later; tests run on it")
    return Fact(topic="torch", level="ok", found=f"{node.torch} ({node.flavour})")


def _accelerators(node: Node, ranks: int) -> list[Fact]:
    topic = "accelerators"
    if node.flavour in ("", "cpu"):
        fix = "install the CUDA or ROCm build of torch; --device cpu needs none"
        return [Fact(topic=topic, level="missing", found="torch is built for the CPU", fix=fix, paths=_DEVICE_PATHS)]
    if not node.devices:
        fix = "give the container its devices (--gpus all, or /dev/kfd and /dev/dri) and the user their group"
        return [Fact(topic=topic, level="missing", found="torch sees none", fix=fix, paths=_DEVICE_PATHS)]
    found = f"{len(node.devices)} of {', '.join(sorted(set(node.devices)))}"
    if len(node.devices) < ranks:
        fix = f"use --nproc {len(node.devices)}, or more nodes; {ranks} ranks want a device each"
        return [Fact(topic=topic, level="degraded", found=found, fix=fix, paths=_DEVICE_PATHS)]
    return [Fact(topic=topic, level="ok", found=found, paths=_DEVICE_PATHS)]


def _peers(node: Node) -> Fact:
    link = "XGMI" if node.flavour == "rocm" else "NVLink or PCIe"
    paths = _DEVICE_PATHS
    if node.peers is None:
        return Fact(topic="peer access", level="ok", found="no devices to look at", paths=paths)
    if not node.peers:
        fix = "let devices see each other: one container for all, IOMMU in pass-through, ACS off"
        level: Level = "missing" if node.flavour == "rocm" else "degraded"
        return Fact(topic="peer access", level=level, found="not between all devices", fix=fix, paths=paths)
    return Fact(topic="peer access", level="ok", found=f"between all devices ({link})", paths=paths)


def _open_files(node: Node) -> Fact:
    found = f"{node.open_files} open files"
    if node.open_files < _OPEN_FILES:
        return Fact(topic="ulimit -n", level="degraded", found=found, fix=f"ulimit -n {_OPEN_FILES} or more")
    return Fact(topic="ulimit -n", level="ok", found=found)


def _shared_memory(node: Node, ranks: int) -> Fact:
    needed = _SHM_PER_RANK * ranks
    found = f"{node.shm_free >> 20} of {node.shm_total >> 20} MiB are free"
    if node.shm_free < needed:
        fix = f"give /dev/shm {needed >> 20} MiB for {ranks} ranks: docker run --shm-size, or --ipc host"
        return Fact(topic="shared memory", level="degraded", found=found, fix=fix)
    return Fact(topic="shared memory", level="ok", found=found)


def _interfaces(node: Node) -> list[Fact]:
    topic = "interfaces"
    complaints = interface_complaints(node.environ, node.interfaces)
    found = []
    for variable in VARIABLES:
        paths = _DEVICE_PATHS if variable.startswith("NCCL") else PATHS
        value = node.environ.get(variable, "")
        if variable in complaints:
            told, _, fix = complaints[variable].rpartition("; ")
            found.append(Fact(topic=topic, level="missing", found=told, fix=fix, paths=paths))
        elif value:
            found.append(Fact(topic=topic, level="ok", found=f"{variable}={value}", paths=paths))
    told = f"{', '.join(node.interfaces) or 'none'}; ranks of one host talk over loopback, others towards node 0"
    return found or [Fact(topic=topic, level="ok", found=told)]


def _names(node: Node) -> list[Fact]:
    fix = "rename or unset it"
    lines = [Fact(topic="environment", level="degraded", found=line, fix=fix) for line in near_misses(node.environ)]
    return lines or [Fact(topic="environment", level="ok", found="no name that is almost one of production's")]


def _unused(node: Node, case: Case) -> list[Fact]:
    """Check for variables that a case through mori and aiter would not use."""
    chain = msgspec.structs.replace(case, transport="mori", experts="aiter")
    lines = unused_variables(node.environ, chain, {})
    return [Fact(topic="environment", level="ok", found=line, paths=("mori",)) for line in lines]


def _locks(node: Node) -> list[Fact]:
    fix = "wait for that bench, or use other devices"
    lines = [Fact(topic="locks", level="degraded", found=f"{name} is held", fix=fix) for name in node.locks]
    return lines or [Fact(topic="locks", level="ok", found="no bench runs here")]
