"""The checks of the AMD path: ROCm, architecture, mori, aiter, their heap, their blocks and their network."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from distbench.case.spec import Case
from distbench.errors import InvalidCase, Unsupported
from distbench.experts.selection.releases import rules_for
from distbench.tools.doctor.findings import Fact, Path
from distbench.tools.doctor.probe import AITER, MORI, Node
from distbench.transport.mori.config import (
    HEAP_SIZE,
    INTRA,
    SHMEM_MODE,
    Launch,
    MoriPlan,
    check_environment,
    doubt_of_mode,
    heap_size,
    is_isolated,
    lost_chunks,
    plan_mori,
)
from distbench.utils.amd_arch import fp8_format
from distbench.utils.versions import release_of

_MORI: tuple[Path, ...] = ("mori",)
_ARCHITECTURES = ("gfx942", "gfx950")
_LAST_WITHOUT_BARRIER = "1.2.2"
_SPLIT_K_FIXED = ("0.1.18", "0.1.19")
_KERNEL_CHANGERS = (
    *("AITER_ONLINE_TUNE", "AITER_BYPASS_TUNE_CONFIG", "AITER_KSPLIT", "AITER_REBUILD"),
    *("AITER_FLYDSL_FORCE_REDUCE", "AITER_FLYDSL_EP_NO_FAKE_EXPERT"),
)


class Network(msgspec.Struct, frozen=True, kw_only=True):
    """Number of nodes that run together; and mori's blocks to check instead of those of the case."""

    nodes: int = 1
    block_num: int | None = None
    rdma_block_num: int | None = None


def check_vendors(node: Node, case: Case, network: Network) -> list[Fact]:
    """Findings about the AMD path."""
    return [
        _rocm(node),
        _hipcc(node),
        _architecture(node),
        _mori(node.packages),
        _aiter(node.packages.get(AITER, "")),
        *_case(node, case, network),
        _heap_mode(node.environ),
        _nics(node, network),
        _memlock(node),
        *_kernel_changers(node.environ),
    ]


def _rocm(node: Node) -> Fact:
    if node.flavour != "rocm":
        found = f"torch is the {node.flavour or 'missing'} build"
        return _missing("ROCm", found, "use a ROCm container with its torch (docs/amd.md)")
    return _ok("ROCm", node.rocm or "torch has its own, /opt/rocm says no version")


def _hipcc(node: Node) -> Fact:
    if not node.hipcc:
        return _missing("hipcc", "not in PATH", "mori and aiter compile kernels: add /opt/rocm/bin to PATH")
    return _ok("hipcc", node.hipcc)


def _architecture(node: Node) -> Fact:
    foreign = sorted({one for one in node.devices if one not in _ARCHITECTURES})
    if foreign or not node.devices:
        found = ", ".join(foreign) or "no device"
        return _missing(
            "gfx architecture", found, f"distbench knows aiter on {' and '.join(_ARCHITECTURES)} (MI300, MI350)"
        )
    return _ok("gfx architecture", ", ".join(sorted(set(node.devices))))


def _mori(packages: Mapping[str, str]) -> Fact:
    installed = _installed(packages)
    found = " and ".join(f"{name} {version}" for name, version in installed.items())
    if not installed:
        return _missing("mori", "not installed", "pip install amd-mori, or use a container that has it (docs/amd.md)")
    if len(installed) > 1:
        return _degraded("mori", f"{found} are both installed, and hold the same modules", "pip uninstall one of them")
    key, last = release_of(next(iter(installed.values()))), release_of(_LAST_WITHOUT_BARRIER)
    if key is None:
        return _degraded("mori", f"{found}: not a version that can be compared", "install a release, such as 1.2.4")
    if last is not None and key <= last:
        fix = "take 1.2.4 or later; distbench synchronises by itself, other users of it do not"
        return _degraded("mori", f"{found}: no barrier after its buffers are made, so ranks can lose signals", fix)
    return _ok("mori", found)


def _installed(packages: Mapping[str, str]) -> dict[str, str]:
    """Installed distributions of mori, by name."""
    return {name: packages[name] for name in MORI if name in packages}


def _aiter(version: str) -> Fact:
    if not version:
        return _missing("aiter", "not installed", "install amd-aiter for this ROCm, or use a container (docs/amd.md)")
    try:
        rules = rules_for(version)
    except InvalidCase as error:
        return _degraded("aiter", f"{version}: {error}", "install a release, or give --aiter-version with each run")
    if rules.fp8_split_columns and release_of(version) not in map(release_of, _SPLIT_K_FIXED):
        fix = f"keep to bf16, or AITER_KSPLIT=-1 for tuned rows; {' and '.join(_SPLIT_K_FIXED)} were right"
        return _degraded("aiter", f"{version}: fp8 split-k of few rows adds to memory never zeroed (#3997)", fix)
    return _ok("aiter", f"{version}: buckets of rows end at {rules.tiers[-1]}, a limit above that keeps the kernel")


def _case(node: Node, case: Case, network: Network) -> list[Fact]:
    """Findings about the case as mori would run it here."""
    asked = msgspec.structs.replace(case, transport="mori", emulate=False)
    try:
        check_environment(node.environ)
        version = next(iter(_installed(node.packages).values()), "")
        plan = plan_mori(asked, node.environ, case.ep_size // network.nodes, units=node.units, version=version)
    except (InvalidCase, Unsupported) as error:
        return [_missing("case", str(error), "choose another case, or another number of ranks or nodes")]
    return [_heap(node.environ, plan), _blocks(node, plan, network), _quant(node, case)]


def _heap(environ: Mapping[str, str], plan: MoriPlan) -> Fact:
    enough = f"unset it, or export {HEAP_SIZE}={-(-plan.heap_bytes >> 30) or 1}G"
    try:
        size = heap_size(plan, environ, emulated=False)
    except InvalidCase as error:
        return _missing("heap", str(error), enough)
    if is_isolated(environ):
        return _ok("heap", f"none, {SHMEM_MODE} is {environ[SHMEM_MODE]}; the case takes {plan.heap_bytes} bytes")
    told = HEAP_SIZE if environ.get(HEAP_SIZE) else f"{HEAP_SIZE} is not set, distbench sets it"
    return _ok("heap", f"{size} bytes ({told}), the case takes {plan.heap_bytes}")


def _blocks(node: Node, plan: MoriPlan, network: Network) -> Fact:
    """Check the blocks of a kernel: all of them run at once, and some of them use the network."""
    own = plan.launch
    blocks = own.blocks if network.block_num is None else network.block_num
    rdma_blocks = own.rdma_blocks if network.rdma_block_num is None else network.rdma_block_num
    launch = Launch(blocks, rdma_blocks, own.warps)
    found = f"{plan.kernel}: rdma_block_num {rdma_blocks} of block_num {blocks}"
    if plan.launch_mode == "AUTO":
        return _degraded("blocks", f"{found}, but launch_mode is AUTO: mori's tables decide", "use MANUAL to compare")
    if node.units is not None and blocks > node.units:
        fix = f"take up to {node.units} blocks: they wait for each other, and would for ever"
        return _missing("blocks", f"{found}, {node.units} compute units", fix)
    if launch != own or plan.kernel not in INTRA:
        return _rdma_blocks(node, plan.kernel, launch, found)
    return _ok("blocks", found)


def _rdma_blocks(node: Node, kernel: str, launch: Launch, found: str) -> Fact:
    if not 0 < launch.rdma_blocks < launch.blocks:
        return _missing("blocks", found, "take a number above 0 and below block_num: others hang")
    lost = lost_chunks(kernel, launch.rdma_blocks, next(iter(_installed(node.packages).values()), ""))
    if lost:
        return _missing("blocks", f"{found}: {lost}", "take a multiple of 8, or a later mori")
    return _ok("blocks", found)


def _quant(node: Node, case: Case) -> Fact:
    others = sorted(set(node.devices) - {"gfx950"})
    if case.combine_quant == "fp4_blockwise" and others:
        return _missing("combine", f"fp4_blockwise on {', '.join(others)}", "mori has it on gfx950; use fp8_blockwise")
    foreign = sorted({one for one in node.devices if fp8_format(one) != case.fp8_format})
    if case.uses_fp8 and foreign:
        fix = f"these compute with {fp8_format(foreign[0])}: add --fp8-format {fp8_format(foreign[0])}"
        return _missing("fp8", f"{case.fp8_format} on {', '.join(foreign)}", fix)
    return _ok("combine", case.combine_quant)


def _heap_mode(environ: Mapping[str, str]) -> Fact:
    mode, doubt = environ.get(SHMEM_MODE, "static_heap"), doubt_of_mode(environ)
    return _degraded("heap mode", mode, f"unset {SHMEM_MODE}: {doubt}") if doubt else _ok("heap mode", mode)


def _nics(node: Node, network: Network) -> Fact:
    active = [name for name, state in node.nics.items() if state == "ACTIVE"]
    found = ", ".join(f"{name} {state}" for name, state in node.nics.items()) or "none"
    if network.nodes > 1 and not active:
        return _missing("NICs", found, f"bring up an RDMA device for {network.nodes} nodes; `rdma link` shows them")
    return _ok("NICs", found if active else f"{found}, and one node needs none")


def _memlock(node: Node) -> Fact:
    if node.memlock is not None and node.nics:
        return _degraded("ulimit -l", f"{node.memlock} bytes", "RDMA locks its memory: ulimit -l unlimited")
    return _ok("ulimit -l", "unlimited" if node.memlock is None else f"{node.memlock} bytes, no NIC needs more")


def _kernel_changers(environ: Mapping[str, str]) -> list[Fact]:
    fix = "unset it, or keep it for all runs that are compared; reports record it"
    return [
        _degraded("environment", f"{name}={environ[name]!r:.40} changes kernels", fix)
        for name in _KERNEL_CHANGERS
        if environ.get(name, "0") not in ("", "0")
    ]


def _ok(topic: str, found: str) -> Fact:
    return Fact(topic=topic, level="ok", found=found, paths=_MORI)


def _degraded(topic: str, found: str, fix: str) -> Fact:
    return Fact(topic=topic, level="degraded", found=found, fix=fix, paths=_MORI)


def _missing(topic: str, found: str, fix: str) -> Fact:
    return Fact(topic=topic, level="missing", found=found, fix=fix, paths=_MORI)
