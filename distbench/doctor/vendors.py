"""The checks of the AMD path: ROCm, architecture, mori, aiter, their heap and their network."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from distbench.case import Case
from distbench.doctor.findings import Finding, Path
from distbench.doctor.probe import Node
from distbench.errors import InvalidCase
from distbench.experts.rules import rules_for

_MORI: tuple[Path, ...] = ("mori",)
_ARCHITECTURES = ("gfx942", "gfx950")
_HEAP_VARIABLE = "MORI_SHMEM_HEAP_SIZE"
_MODE_VARIABLE = "MORI_SHMEM_MODE"
_DEFAULT_HEAP = 4 << 30
_SIZE = re.compile(r"([0-9]+)([KMGT]?)(?:i?B)?", re.IGNORECASE)
_SHIFT = {"": 0, "K": 10, "M": 20, "G": 30, "T": 40}
_RDMA_MULTIPLE = 8
_NO_BARRIER = ("1.1.1", "1.2.0", "1.2.1", "1.2.2")
_SPLIT_K_FIXED = ("0.1.18", "0.1.19")
_KERNEL_CHANGERS = ("AITER_ONLINE_TUNE", "AITER_BYPASS_TUNE_CONFIG", "AITER_KSPLIT", "AITER_REBUILD")


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """Nodes that run together, and the blocks of mori's kernels between them; production takes 64, of them 32."""

    nodes: int = 1
    block_num: int = 64
    rdma_block_num: int = 32


def check_vendors(node: Node, case: Case, network: Network) -> list[Finding]:
    """Return what is to be said of the AMD path."""
    return [
        _rocm(node),
        _hipcc(node),
        _architecture(node),
        _mori(node.packages.get("mori", "")),
        _aiter(node.packages.get("aiter", "")),
        _heap(node.environ, case),
        _heap_mode(node.environ),
        _nics(node, network),
        _rdma_blocks(network),
        _memlock(node),
        *_kernel_changers(node.environ),
    ]


def _rocm(node: Node) -> Finding:
    if node.flavour != "rocm":
        found = f"torch is the {node.flavour or 'missing'} build"
        return _missing("ROCm", found, "use a ROCm container with its torch (docs/amd.md)")
    return _ok("ROCm", node.rocm or "torch has its own, /opt/rocm says no version")


def _hipcc(node: Node) -> Finding:
    if not node.hipcc:
        return _missing("hipcc", "not in PATH", "mori and aiter compile kernels: add /opt/rocm/bin to PATH")
    return _ok("hipcc", node.hipcc)


def _architecture(node: Node) -> Finding:
    foreign = sorted({one for one in node.devices if one not in _ARCHITECTURES})
    if foreign or not node.devices:
        found = ", ".join(foreign) or "no device"
        return _missing(
            "gfx architecture", found, f"distbench knows aiter on {' and '.join(_ARCHITECTURES)} (MI300, MI350)"
        )
    return _ok("gfx architecture", ", ".join(sorted(set(node.devices))))


def _mori(version: str) -> Finding:
    if not version:
        return _missing("mori", "not installed", "pip install amd-mori, or use a container that has it (docs/amd.md)")
    if version.startswith(_NO_BARRIER):
        fix = "take 1.2.4 or later; distbench synchronises by itself, other users of it do not"
        return _degraded("mori", f"{version}: no barrier after its buffers are made, so ranks can lose signals", fix)
    return _ok("mori", version)


def _aiter(version: str) -> Finding:
    if not version:
        return _missing("aiter", "not installed", "install amd-aiter for this ROCm, or use a container (docs/amd.md)")
    try:
        rules = rules_for(version)
    except InvalidCase as error:
        return _missing("aiter", f"{version}: {error}", "install a release")
    if rules.fp8_split_columns and version not in _SPLIT_K_FIXED:
        fix = f"keep to bf16, or AITER_KSPLIT=-1 for tuned rows; {' and '.join(_SPLIT_K_FIXED)} were right"
        return _degraded("aiter", f"{version}: fp8 split-k of few rows adds to memory never zeroed (#3997)", fix)
    return _ok("aiter", f"{version}: buckets of rows end at {rules.tiers[-1]}, a limit above that keeps the kernel")


def _heap(environ: Mapping[str, str], case: Case) -> Finding:
    needed, text = heap_bytes(case), environ.get(_HEAP_VARIABLE, "")
    given = parse_size(text) if text else _DEFAULT_HEAP
    fix = f"export {_HEAP_VARIABLE}={-(-needed >> 30) or 1}G"
    if given is None:
        return _missing("heap", f"{_HEAP_VARIABLE}={text!r:.40} is no size", fix)
    found = f"{given} bytes ({_HEAP_VARIABLE if text else 'the default'}), the case takes at least {needed}"
    return _missing("heap", found, fix) if given < needed else _ok("heap", found)


def heap_bytes(case: Case) -> int:
    """Return what the case's symmetric buffers take at the least: rows out of dispatch, into and out of combine."""
    row = case.hidden_size * 2 * 3 + case.topk * 8 + case.hidden_size // 128 * 4
    return case.capacity * row


def parse_size(text: str) -> int | None:
    """Return the bytes that `6G`, `512MiB` or `1024` mean to mori, None where it is no size."""
    match = _SIZE.fullmatch(text.strip())
    return int(match[1]) << _SHIFT[match[2].upper()] if match else None


def _heap_mode(environ: Mapping[str, str]) -> Finding:
    mode = environ.get(_MODE_VARIABLE, "static_heap")
    if mode != "static_heap":
        fix = f"unset {_MODE_VARIABLE}: vmm_heap has corrupted rows on ROCm 7.2 (mori #610)"
        return _degraded("heap mode", mode, fix)
    return _ok("heap mode", mode)


def _nics(node: Node, network: Network) -> Finding:
    active = [name for name, state in node.nics.items() if state == "ACTIVE"]
    found = ", ".join(f"{name} {state}" for name, state in node.nics.items()) or "none"
    if network.nodes > 1 and not active:
        return _missing("NICs", found, f"bring up an RDMA device for {network.nodes} nodes; `rdma link` shows them")
    return _ok("NICs", found if active else f"{found}, and one node needs none")


def _rdma_blocks(network: Network) -> Finding:
    block_num, rdma_block_num = network.block_num, network.rdma_block_num
    found = f"rdma_block_num {rdma_block_num} of block_num {block_num}"
    if not 0 < rdma_block_num < block_num or rdma_block_num % _RDMA_MULTIPLE:
        fix = f"take a multiple of {_RDMA_MULTIPLE} above 0 and below block_num: others drop rows or hang (mori #507)"
        return _missing("rdma_block_num", found, fix)
    return _ok("rdma_block_num", found)


def _memlock(node: Node) -> Finding:
    if node.memlock is not None and node.nics:
        return _degraded("ulimit -l", f"{node.memlock} bytes", "RDMA locks its memory: ulimit -l unlimited")
    return _ok("ulimit -l", "unlimited" if node.memlock is None else f"{node.memlock} bytes, no NIC needs more")


def _kernel_changers(environ: Mapping[str, str]) -> list[Finding]:
    fix = "unset it, or keep it for all runs that are compared; reports record it"
    return [
        _degraded("environment", f"{name}={environ[name]!r:.40} changes kernels", fix)
        for name in _KERNEL_CHANGERS
        if environ.get(name, "0") not in ("", "0")
    ]


def _ok(topic: str, found: str) -> Finding:
    return Finding(topic=topic, level="ok", found=found, paths=_MORI)


def _degraded(topic: str, found: str, fix: str) -> Finding:
    return Finding(topic=topic, level="degraded", found=found, fix=fix, paths=_MORI)


def _missing(topic: str, found: str, fix: str) -> Finding:
    return Finding(topic=topic, level="missing", found=found, fix=fix, paths=_MORI)
