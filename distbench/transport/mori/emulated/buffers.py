"""The configuration of an operator, and its buffers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch

from distbench.transport.mori.emulated import quirks
from distbench.transport.mori.emulated.codec import combine_row_bytes
from distbench.transport.mori.emulated.heap import Heap, Region
from distbench.transport.mori.emulated.routing import TWO_LEVELS, EpDispatchCombineKernelType

BLOCKWISE = ("fp8_blockwise", "fp4_blockwise")


@dataclass
class EpDispatchCombineConfig:
    """The wheel's fields and defaults; sizes in elements, tokens or bytes as docs/mori.md lists them."""

    data_type: torch.dtype
    rank: int
    world_size: int
    hidden_dim: int
    scale_dim: int
    scale_type_size: int
    max_token_type_size: int
    max_num_inp_token_per_rank: int
    num_experts_per_rank: int
    num_experts_per_token: int
    warp_num_per_block: int = 8
    block_num: int = 80
    max_total_recv_tokens: int = 0
    use_external_inp_buf: bool = True
    kernel_type: EpDispatchCombineKernelType = EpDispatchCombineKernelType.IntraNode
    gpu_per_node: int = 8
    rdma_block_num: int = 0
    num_qp_per_pe: int = 1
    quant_type: str = "none"

    def rows_sent(self) -> int:
        """Return W * M, the number of source positions per rank."""
        return self.world_size * self.max_num_inp_token_per_rank

    def rows_received_per_rank(self) -> int:
        """Return R / W."""
        most, cap = self.max_num_inp_token_per_rank, self.max_total_recv_tokens
        return min(-(-cap // self.world_size), most) if cap > 0 else most

    def rows_received(self) -> int:
        """Return R."""
        return self.world_size * self.rows_received_per_rank()


class Buffers(NamedTuple):
    """Regions of the heap, in the order in which the package allocates them."""

    combine_inp: Region
    dispatch_out: Region
    combine_out: Region
    weights: Region
    combine_weights: Region
    scales: Region
    ids: Region
    sources: Region
    staging: tuple[Region, ...]
    """Regions between the others that only the package's kernels read and write."""

    @property
    def regions(self) -> int:
        """Number of regions."""
        return len(self) - 1 + len(self.staging)


def allocate(heap: Heap, config: EpDispatchCombineConfig) -> Buffers:
    """Allocate an operator's buffers on the heap."""
    malloc, rows, topk = heap.malloc, config.rows_received(), config.num_experts_per_token
    payload = config.hidden_dim * config.max_token_type_size
    scales = config.scale_dim * config.scale_type_size
    before, beside, behind = _staged_slots(config)
    slot = payload + scales + 8 * topk + 4
    combined = slot
    if config.kernel_type is EpDispatchCombineKernelType.IntraNode and config.quant_type in BLOCKWISE:
        combined = combine_row_bytes(config.quant_type, config.hidden_dim, payload) + 8 * topk + 4
    staging = [malloc(slots * slot) for slots in before]
    rows_in = config.rows_sent() if config.kernel_type is EpDispatchCombineKernelType.AsyncLL else rows
    combine_inp = malloc(rows_in * combined)
    staging += [malloc(slots * slot) for slots in beside]
    dispatch_out = malloc(rows * payload)
    combine_out = malloc(config.max_num_inp_token_per_rank * payload)
    staging += [malloc(slots * slot) for slots in behind]
    return Buffers(
        combine_inp=combine_inp,
        dispatch_out=dispatch_out,
        combine_out=combine_out,
        weights=malloc(rows * topk * 4),
        combine_weights=malloc(rows * topk * 4),
        scales=malloc(rows * scales),
        ids=malloc(rows * topk * 4),
        sources=malloc(config.rows_sent() * config.num_experts_per_rank * 4),
        staging=tuple(staging),
    )


def _staged_slots(config: EpDispatchCombineConfig) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Return the slots of each staging buffer before combineInp, behind it, and behind combineOut."""
    if config.kernel_type is EpDispatchCombineKernelType.AsyncLL:
        sent = config.rows_sent()
        return (sent,), (sent,), (sent,) if quirks.has(quirks.STAGED_DISPATCH) else ()
    if config.kernel_type in TWO_LEVELS:
        sender = config.max_num_inp_token_per_rank
        nodes = config.world_size // config.gpu_per_node
        return (nodes * sender,), (2 * nodes * sender,), (sender,)
    return (), (), ()
