"""MoRI's settings for a case: kernel type, launch geometry, configuration, memory, and refusals. Loads no torch.

Sources: SGLang's `moriep.py` for the choices, vLLM's `all2all.py` and ATOM's `mori_prepare_finalize.py` for theirs by
`mori_geometry`; MoRI's `dispatch_combine.hpp` and `dispatch_combine.cpp` for sizes and
bounds; docs/mori.md describes both.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, NoReturn

import msgspec

from distbench.case.sglang_releases import SDMA, enables, rules_of, sglang_enables
from distbench.case.spec import Case
from distbench.errors import InvalidCase, Unsupported
from distbench.transport.mori.heap_size import parse_heap_size
from distbench.transport.mori.releases import async_buffers, refused_settings, version_for
from distbench.transport.sum_order import SumOrder
from distbench.utils.amd_arch import arch_of
from distbench.utils.devices import architecture
from distbench.utils.variables import whole
from distbench.utils.versions import release_of

HEAP_SIZE = "MORI_SHMEM_HEAP_SIZE"
SHMEM_MODE = "MORI_SHMEM_MODE"

INTRA = ("IntraNode", "IntraNodeLL")
TWO_LEVELS = ("InterNodeV1", "InterNodeV1LL")
SKIPS_NEGATIVE = (*INTRA, "InterNodeV1")
BLOCKWISE = ("fp8_blockwise", "fp4_blockwise")

_STATIC_HEAP, _VMM_HEAP, _ISOLATION = ((name, name.upper()) for name in ("static_heap", "vmm_heap", "isolation"))
_MAX_NODE = 8
_LL_TOPK = 8
_MAX_TOPK = 64
_INTRA_BLOCKS = 80
_ELEMENT = 2
_SCALE_BLOCKS = "MORI_FP8_COMBINE_SCALE_DIM"
_SMALLEST_HEAP = 4 << 30
_HEAP_STEP = 64 << 20
SMALL_BUFFERS = 1 << 20
_RECEIVING_BLOCKS = 8
_FIRST_WITH_WHOLE_CHUNKS = "1.2.4"


class Launch(NamedTuple):
    """Blocks of the grid, the RDMA blocks among them, and warps of a block; -1 leaves all three to MoRI."""

    blocks: int
    rdma_blocks: int
    warps: int


class MoriPlan(msgspec.Struct, frozen=True, kw_only=True):
    """MoRI's settings in a case. `heap_bytes` is what its operators take of the symmetric heap, one or two."""

    kernel: str
    nodes: int
    gpu_per_node: int
    launch: Launch
    launch_mode: str
    quant: str
    external: bool
    max_total_recv_tokens: int
    num_qp_per_pe: int
    heap_bytes: int

    def values(self, case: Case, rank: int) -> dict[str, Any]:
        """Return the keywords of `EpDispatchCombineConfig`, except those whose values are types of the package."""
        scales = case.hidden_size // 128 if case.dispatch_dtype == "fp8" else 0
        values = {
            "rank": rank,
            "world_size": case.ep_size,
            "hidden_dim": case.hidden_size,
            "scale_dim": scales,
            "scale_type_size": 4,
            "max_token_type_size": _ELEMENT,
            "max_num_inp_token_per_rank": case.max_dispatch_tokens_per_rank,
            "num_experts_per_rank": case.experts_per_rank,
            "num_experts_per_token": case.topk_slots,
            "warp_num_per_block": self.launch.warps,
            "block_num": self.launch.blocks,
            "use_external_inp_buf": self.external,
            "gpu_per_node": self.gpu_per_node,
            "rdma_block_num": self.launch.rdma_blocks,
            "num_qp_per_pe": self.num_qp_per_pe,
            "quant_type": self.quant,
        }
        return values | ({"max_total_recv_tokens": self.max_total_recv_tokens} if self.max_total_recv_tokens else {})


def plan_mori(
    case: Case,
    environ: Mapping[str, str],
    local_ranks: int | None = None,
    *,
    units: int | None = None,
    version: str | None = None,
) -> MoriPlan:
    """Choose kernel type and geometry as SGLang does, and refuse settings that MoRI would get wrong or hang on.

    `local_ranks` is the launch's number of ranks on each of its nodes; None: all ranks are on one. `units` is the
    number of compute units of this rank's device; None: unknown, so that no grid is clamped; emulated: `cu_count`.
    `version` is MoRI's; None: that of the case.

    Raises:
        InvalidCase: names the value, the bound and the fix.
        Unsupported: MoRI's constructor would raise under these variables.
    """
    release = version_for(case) if version is None else version
    per_node = _ranks_per_node(case, min(local_ranks or case.ep_size, case.ep_size))
    if case.ep_size % per_node or per_node & (per_node - 1):
        _refuse(
            f"gpu_per_node = {per_node}: MoRI takes a power of two that divides the {case.ep_size} ranks; "
            "set gpu_per_node to one, or use another number of ranks"
        )
    nodes = case.ep_size // per_node
    kernel = _kernel(case, nodes)
    _check_kernel(case, kernel, nodes)
    _check_input(case, kernel)
    _check_quant(case, kernel)
    _check_cap(case, kernel, environ)
    _check_settings(kernel, nodes, environ, release)
    return MoriPlan(
        kernel=kernel,
        nodes=nodes,
        gpu_per_node=per_node,
        launch=_launch(case, kernel, case.cu_count if case.emulate else units),
        launch_mode=case.launch_mode,
        quant=case.combine_quant,
        external=case.combine_input == "external",
        max_total_recv_tokens=case.prealloc_max_recv_tokens,
        num_qp_per_pe=2 if case.mori_geometry == "sglang" or kernel == "AsyncLL" else 1,
        heap_bytes=(1 + case.two_batch_overlap) * _heap_bytes(case, kernel, nodes, environ, async_buffers(release)),
    )


def production_kernel(case: Case, local_ranks: int | None = None) -> str:
    """Kernel type that SGLang would choose for the case, whatever its transport here.

    With a transport other than MoRI, up to eight ranks of a launch count as one node, as in SGLang.
    """
    if case.transport == "mori":
        per_node = _ranks_per_node(case, min(local_ranks or case.ep_size, case.ep_size))
    else:
        per_node = case.gpu_per_node or min(_MAX_NODE, local_ranks or _MAX_NODE)
    return _kernel(case, -(-case.ep_size // per_node))


def heap_size(plan: MoriPlan, environ: Mapping[str, str], *, emulated: bool) -> int:
    """Return the bytes of the symmetric heap: MORI_SHMEM_HEAP_SIZE if set, else the case's need.

    In isolation mode MoRI allocates each buffer separately and ignores the variable.

    Raises:
        InvalidCase: the variable is not a size, or is too small for the case's operator.
    """
    text = "" if is_isolated(environ) else environ.get(HEAP_SIZE, "")
    if not text:
        rounded = -(-plan.heap_bytes // _HEAP_STEP) * _HEAP_STEP
        return rounded if emulated else max(rounded, _SMALLEST_HEAP)
    try:
        size = parse_heap_size(text)
    except ValueError as error:
        _refuse(f"env:{HEAP_SIZE} = {text!r:.60}: {error}")
    if size < plan.heap_bytes:
        _refuse(
            f"env:{HEAP_SIZE} = {text}: {size} bytes, the case needs {plan.heap_bytes}; raise or unset it, or lower "
            "max_dispatch_tokens_per_rank"
        )
    return size


def sum_order(kernel: str, gpu_per_node: int, quant: str) -> SumOrder:
    """Return the order in which a kernel type of MoRI adds."""
    return SumOrder(
        last_slot=kernel == "IntraNodeLL",
        node_ranks=gpu_per_node if kernel in TWO_LEVELS else 0,
        quantised=quant != "none",
    )


def lost_chunks(kernel: str, rdma_blocks: int, version: str) -> str:
    """Return why dispatch would drop and double rows with this number of RDMA blocks; "" if it would not.

    Releases before 1.2.4 index the part of a chunk by the block, not by the loop iteration (mori #507). A version that
    cannot be compared counts as affected.
    """
    key, fixed = release_of(version), release_of(_FIRST_WITH_WHOLE_CHUNKS)
    if kernel != "InterNodeV1" or rdma_blocks % _RECEIVING_BLOCKS == 0 or (key and fixed and key >= fixed):
        return ""
    return (
        f"rdma_block_num {rdma_blocks}: InterNodeV1 of mori {version or 'unknown'} drops and doubles rows without a "
        f"multiple of {_RECEIVING_BLOCKS} (mori #507, mended in {_FIRST_WITH_WHOLE_CHUNKS})"
    )


def mori_warnings(plan: MoriPlan, environ: Mapping[str, str], *, emulated: bool) -> tuple[str, ...]:
    """Return warnings about MoRI's settings, for readers of a report."""
    doubt = doubt_of_mode(environ)
    found = [f"{SHMEM_MODE}={environ[SHMEM_MODE]}: {doubt}; unset it to compare"] if doubt else []
    if plan.launch_mode == "AUTO":
        found.append("launch_mode = AUTO: MoRI's tuning tables decide the launch geometry; MANUAL pins it")
    sdma = environ.get(SDMA, "")
    if plan.kernel == "AsyncLL" and not emulated and not enables(sdma):
        found.append(f"mori_kernel = AsyncLL without {SDMA}=1 copies by compute units, about 40 times slower")
    if enables(sdma) and not sglang_enables(sdma):
        found.append(
            f"{SDMA}={sdma}: MoRI reads it as on, SGLang reads true and 1 only and does not use AsyncLL; write 1 or 0"
        )
    return tuple(found)


def is_isolated(environ: Mapping[str, str]) -> bool:
    """Whether MoRI allocates each buffer separately: it knows two spellings of that mode."""
    return environ.get(SHMEM_MODE, "") in _ISOLATION


def doubt_of_mode(environ: Mapping[str, str]) -> str:
    """Reason to doubt results under the current heap mode; "" without one."""
    mode = environ.get(SHMEM_MODE, "")
    if mode in _VMM_HEAP:
        return "vmm_heap has corrupted rows on ROCm 7.2 (mori #610)"
    if mode and mode not in (*_ISOLATION, *_STATIC_HEAP):
        return "MoRI knows static_heap, vmm_heap and isolation, and falls back to static_heap"
    return ""


def check_environment(environ: Mapping[str, str]) -> None:
    """Refuse environment variables that would silently change the case.

    Raises:
        InvalidCase: a variable that MoRI reads as a number is none.
        Unsupported: the cco backend, which waits for ranks outside the expert-parallel group.
    """
    if environ.get("MORI_EP_COMM", "shmem") != "shmem":
        message = f"env:MORI_EP_COMM = {environ['MORI_EP_COMM']!r:.40}: only the shmem backend is supported; unset it"
        raise Unsupported(message)
    _scale_blocks(environ)


def _ranks_per_node(case: Case, there: int) -> int:
    """Return gpu_per_node: the case's ranks on one node, or those of an emulated node."""
    if case.emulate:
        return case.gpu_per_node or min(_MAX_NODE, there)
    if case.gpu_per_node not in (0, there):
        _refuse(
            f"gpu_per_node = {case.gpu_per_node}: the launch has {there} of the case's ranks on each node, and MoRI "
            f"would store over XGMI what is on another; drop the key, or start {case.gpu_per_node} ranks on each node"
        )
    return there


def _kernel(case: Case, nodes: int) -> str:
    if case.mori_kernel != "auto":
        return case.mori_kernel
    if nodes == 1:
        return "IntraNode"
    return "InterNodeV1LL" if case.max_dispatch_tokens_per_rank <= case.inter_kernel_switch else "InterNodeV1"


def _launch(case: Case, kernel: str, units: int | None) -> Launch:
    if case.mori_geometry == "vllm" and kernel in TWO_LEVELS and _architecture(case) == "gfx942":
        return Launch(32, 16, 16)
    if case.mori_geometry.startswith("atom-") and kernel != "AsyncLL":
        return _atom_launch(case, kernel, units)
    if kernel in INTRA:
        clamped = kernel == "IntraNode" and rules_of(case.sglang_version).clamps_grid
        return Launch(min(_INTRA_BLOCKS, units) if clamped and units else _INTRA_BLOCKS, 0, 16)
    if kernel == "AsyncLL":  # whose blocks are distributed over the ranks
        return Launch(max(64 // case.ep_size, 1) * case.ep_size, 32, 8)
    return Launch(64, 32, 8)


def _atom_launch(case: Case, kernel: str, units: int | None) -> Launch:
    """ATOM's launch: blocks by the kind of batch, never more than compute units.

    ATOM gives warps instead of MoRI's RDMA blocks, 16 or 4, so that warps stay those of the configuration. Within
    a node RDMA blocks have no effect.
    """
    blocks, given = (128, 16) if case.mori_geometry == "atom-prefill" else (64, 4)
    return Launch(min(blocks, units or blocks), given if kernel in TWO_LEVELS else 0, 16)


def _architecture(case: Case) -> str:
    return arch_of(case.cu_count) if case.emulate else architecture()


def _check_kernel(case: Case, kernel: str, nodes: int) -> None:
    if kernel in INTRA and (nodes > 1 or case.ep_size > _MAX_NODE):
        _refuse(
            f"mori_kernel = {kernel}: {case.ep_size} ranks on {nodes} nodes; it moves rows within one node of up to "
            f"{_MAX_NODE} ranks; use InterNodeV1, InterNodeV1LL or AsyncLL"
        )
    if kernel == "IntraNodeLL" and case.topk_slots > _LL_TOPK:
        _refuse(f"topk = {case.topk_slots}: IntraNodeLL loses the slots past {_LL_TOPK}; use IntraNode")
    if kernel in TWO_LEVELS and nodes > case.topk_slots:
        _refuse(f"topk = {case.topk_slots}: {kernel} has room for as many nodes, the case has {nodes}; use AsyncLL")
    if case.topk_slots >= _MAX_TOPK:
        _refuse(f"topk = {case.topk_slots}: MoRI's kernels take up to {_MAX_TOPK - 1}")


def _check_input(case: Case, kernel: str) -> None:
    if case.combine_input == "registered" and kernel not in INTRA:
        _refuse(
            f"combine_input = registered: {kernel} stages rows in that very buffer, and peers or a cast overwrite what "
            f"it has yet to read; use external, or {' or '.join(INTRA)}"
        )


def _check_quant(case: Case, kernel: str) -> None:
    quant = case.combine_quant
    if quant == "none":
        return
    kernels = INTRA if quant == "fp4_blockwise" else (*INTRA, "AsyncLL")
    if quant in BLOCKWISE and kernel not in kernels:
        _refuse(f"combine_quant = {quant}: not with {kernel}; use one of {', '.join(kernels)}, or fp8_direct_cast")
    if case.combine_input == "registered":
        _refuse(f"combine_quant = {quant}: not applied to rows in the registered buffer; use combine_input = external")


def _check_cap(case: Case, kernel: str, environ: Mapping[str, str]) -> None:
    """Refuse a receive cap under which pushed rows overflow the combine buffer, whose size follows from the cap."""
    if not case.prealloc_max_recv_tokens or kernel not in INTRA or case.combine_input == "registered":
        return
    reached = (case.ep_size - 1) * case.max_dispatch_tokens_per_rank + max(case.tokens)
    needed, there = reached * _row_bytes(case, environ), case.capacity * _slot_bytes(case, kernel, environ)
    if needed > there:
        _refuse(
            f"prealloc_max_recv_tokens = {case.prealloc_max_recv_tokens}: MoRI's combine buffer has {there} bytes, "
            f"{kernel} writes up to byte {needed}; use 0, or combine_input = registered"
        )


def _check_settings(kernel: str, nodes: int, environ: Mapping[str, str], version: str) -> None:
    refused = refused_settings(kernel, nodes, environ, version)
    if refused:
        raise Unsupported(refused)


def _row_bytes(case: Case, environ: Mapping[str, str]) -> int:
    """Bytes of a pushed expert row: its payload and its block scales."""
    if case.combine_quant == "none":
        return case.hidden_size * _ELEMENT
    payload = -(-case.hidden_size // 2) if case.combine_quant == "fp4_blockwise" else case.hidden_size
    return payload + (_block_scale_bytes(environ) if case.combine_quant in BLOCKWISE else 0)


def _slot_bytes(case: Case, kernel: str, environ: Mapping[str, str]) -> int:
    """Bytes that MoRI allots to a row of the combine buffer."""
    payload, rest = case.hidden_size * _ELEMENT, 8 * case.topk_slots + 4
    if kernel == "IntraNode" and case.combine_quant in BLOCKWISE:
        if case.combine_quant == "fp4_blockwise":
            payload = -(-case.hidden_size // 2)
        return payload + rest + _block_scale_bytes(environ)
    return payload + rest + _scale_bytes(case)


def _scale_bytes(case: Case) -> int:
    return case.hidden_size // 128 * 4 if case.dispatch_dtype == "fp8" else 0


def _block_scale_bytes(environ: Mapping[str, str]) -> int:
    return 4 * _scale_blocks(environ)


def _scale_blocks(environ: Mapping[str, str]) -> int:
    """Blocks of a row that comes back quantised."""
    return whole(_SCALE_BLOCKS, environ.get(_SCALE_BLOCKS, "").strip() or "56", least=1)


def _heap_bytes(case: Case, kernel: str, nodes: int, environ: Mapping[str, str], in_async: int) -> int:
    """Return the bytes of an operator's symmetric buffers with padding, in the order of MoRI's `InitializeShmemBuf`.

    `in_async` is the number of buffers in which AsyncLL stages rows.
    """
    rows, most = case.capacity, case.ep_size * case.max_dispatch_tokens_per_rank
    sender, payload = case.max_dispatch_tokens_per_rank, case.hidden_size * _ELEMENT
    transfer = payload + 8 * case.topk_slots + 4 + _scale_bytes(case)
    if kernel in INTRA:
        staging = rows * _slot_bytes(case, kernel, environ)
    elif kernel in TWO_LEVELS:
        staging = rows * transfer + (3 * nodes + 1) * sender * transfer
    else:
        staging = in_async * most * transfer
    blocks = _block_scale_bytes(environ) if case.combine_quant in BLOCKWISE else 0
    scales = rows * (max(_scale_bytes(case), blocks) + _scale_bytes(case))
    maps = most * case.experts_per_rank * 4
    return staging + (rows + sender) * payload + 5 * rows * case.topk_slots * 4 + scales + maps + SMALL_BUFFERS


def _refuse(message: str) -> NoReturn:
    raise InvalidCase(message)
