"""State of an operator, and the movement of its rows: sent, received, sent back, added."""

from __future__ import annotations

import os
from itertools import count
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.case.sglang_releases import enables
from distbench.transport.mori.emulated import quirks, shmem
from distbench.transport.mori.emulated._jit_loader import load_hip_module
from distbench.transport.mori.emulated.buffers import EpDispatchCombineConfig, allocate
from distbench.transport.mori.emulated.codec import Plain, make_codec, of_its_own
from distbench.transport.mori.emulated.heap import at_address
from distbench.transport.mori.emulated.launch import Launches
from distbench.transport.mori.emulated.routing import INTRA, TWO_LEVELS, EpDispatchCombineKernelType, Shape, owners
from distbench.transport.mori.emulated.sums import NodeSums, Returned, Staged, cast, stage, sum_slots

TOPK_IDX_DTYPE = torch.int32
QUANT_TYPES = ("none", "fp8_direct_cast", "fp8_blockwise", "fp4_blockwise")

_TOKEN_BYTES = 4
HIP_NAMES = {
    EpDispatchCombineKernelType.IntraNode: "ep_intranode",
    EpDispatchCombineKernelType.IntraNodeLL: "ep_intranode",
    EpDispatchCombineKernelType.InterNodeV1: "ep_internode_v1",
    EpDispatchCombineKernelType.InterNodeV1LL: "ep_internode_v1ll",
    EpDispatchCombineKernelType.AsyncLL: "ep_async_ll",
}
_numbers: dict[str, count[int]] = {}


class _Sent(NamedTuple):
    """Rows that have arrived, uint8 [m, width], ordered by source rank; by_source int64 [W] counts them."""

    rows: Tensor
    by_source: Tensor
    payload: int
    scales: int


def _check_settings(config: EpDispatchCombineConfig) -> None:
    """Refuse what the package's C++ constructor refuses, in its words (`dispatch_combine.cpp`)."""
    if config.world_size <= config.gpu_per_node:
        return
    if config.kernel_type is EpDispatchCombineKernelType.AsyncLL and enables(
        os.environ.get("MORI_ENABLE_RAIL_ONLY", "")
    ):
        message = (
            f"MORI_ENABLE_RAIL_ONLY is set, but kernelType={config.kernel_type.value} (InterNode v0 / AsyncLL) sends "
            "cross-node RDMA to arbitrary PEs, which have no QP in rail-only mode. Use InterNodeV1 or InterNodeV1LL, "
            "or unset MORI_ENABLE_RAIL_ONLY."
        )
        raise RuntimeError(message)
    atomic_free = quirks.has(quirks.ATOMICS_SWITCH) and enables(os.environ.get("MORI_EP_DISABLE_RDMA_ATOMICS", ""))
    if atomic_free and config.kernel_type in TWO_LEVELS and os.environ.get("MORI_IB_ENABLE_RELAXED_ORDERING") == "1":
        message = (
            "MORI_EP_DISABLE_RDMA_ATOMICS cannot be combined with MORI_IB_ENABLE_RELAXED_ORDERING=1: with relaxed "
            "ordering a WRITE signal may become visible before its data."
        )
        raise RuntimeError(message)


class RowMoves:
    """Buffers, the counter of received rows, and the rows in flight between a send and a receive half."""

    def __init__(self, config: EpDispatchCombineConfig) -> None:
        """Allocate the buffers; ranks wait for each other on the default process group, as in the package.

        Raises:
            ValueError: an unknown quantisation or launch mode.
            NotImplementedError: the kernel type InterNode.
            RuntimeError: variables with which the kernel type would hang between nodes.
        """
        if config.quant_type not in QUANT_TYPES:
            message = f"invalid quant_type '{config.quant_type}', expected one of {list(QUANT_TYPES)}"
            raise ValueError(message)
        if config.kernel_type is EpDispatchCombineKernelType.InterNode:
            quirks.refuse("kernel type InterNode, the predecessor of InterNodeV1,")
        if config.world_size % config.gpu_per_node or config.gpu_per_node & (config.gpu_per_node - 1):
            quirks.trap("assertion failed: IsPowerOf2(gpuPerNode) && worldSize % gpuPerNode == 0")
        _check_settings(config)
        self.config = config
        self._world = shmem.world()
        dist.barrier()
        self._buffers = allocate(self._world.heap, config)
        self._launches = Launches(config)
        self._hip_module = load_hip_module(HIP_NAMES[config.kernel_type])
        self._shape = Shape(config.kernel_type, config.world_size, config.num_experts_per_rank)
        self._total = torch.zeros(1, dtype=TOPK_IDX_DTYPE, device=self._world.heap.bytes.device)
        self._nodes = NodeSums(self._shape, config.gpu_per_node, config.max_num_inp_token_per_rank)
        self._sent: _Sent | None = None
        self._returned: Returned | None = None
        self._route = torch.empty(0, config.num_experts_per_token, dtype=torch.long)
        self.local_expert_count = torch.zeros_like(self._total).repeat(config.num_experts_per_rank)
        self._calls = 0
        self._number = next(_numbers.setdefault(self._world.name, count()))
        shmem.store().set(self._zeroed(self.config.rank), "")
        if not quirks.has(quirks.NO_CONSTRUCTOR_BARRIER):
            dist.barrier()

    def __del__(self) -> None:
        """Free the buffers while the heap still exists."""
        if hasattr(self, "_buffers"):
            self._world.heap.free(self._buffers.regions)

    def _zeroed(self, rank: int) -> str:
        return f"{self._world.name}/op{self._number}/{rank}"

    def _send(self, rows: Tensor, payload: int, scales: int) -> None:
        token, slot = (self._route < self.config.world_size).nonzero().unbind(1)
        to = self._route[token, slot]
        order = to.argsort(stable=True)
        flat = (self.config.rank * self.config.rows_sent() + token).to(torch.int32).view(-1, 1)
        going = torch.cat([rows[token], flat.view(torch.uint8)], dim=1)[order]
        arrived, by_source = self._exchange(going, to)
        self._sent = _Sent(arrived, by_source, payload, scales)
        self._calls += 1

    def _receive(self) -> None:
        sent, self._sent = self._sent, None
        if sent is None:
            message = "dispatch_recv requires a prior dispatch/dispatch_send call"
            raise AssertionError(message)
        rows, buffers, ids = sent.rows, self._buffers, self.config.num_experts_per_token * 4
        if rows.shape[0] > self.config.rows_received() and self._asserts_overflow():
            quirks.trap("assertion failed: Total recv token overflow: increase maxTotalRecvTokens")
        if self.config.kernel_type is EpDispatchCombineKernelType.AsyncLL:
            owners_of = owners(
                of_its_own(rows[:, sent.payload + ids : sent.payload + 2 * ids]).view(torch.int32), self._shape
            )
            if bool((owners_of == self.config.world_size).any()):
                quirks.trap("assertion failed: (pe >= 0) && (pe < config.worldSize)")
        slots = self._slots(sent.by_source).to(rows.device)
        widths = (sent.payload, ids, ids, sent.scales, _TOKEN_BYTES)
        regions = (buffers.dispatch_out, buffers.weights, buffers.ids, buffers.scales, buffers.sources)
        for region, part in zip(regions, rows.split(widths, dim=1), strict=True):
            if not self._is_stale(quirks.STALE_RECEIVE):
                region.put(slots, part)
        self._total += rows.shape[0]

    def _count_local(self) -> None:
        """Count the slots of received rows that name a local expert, per expert."""
        local = self.config.num_experts_per_rank
        received = self._buffers.ids.view(int(self._total), self.config.num_experts_per_token, TOPK_IDX_DTYPE)
        experts = received.flatten().long() - self.config.rank * local
        mine = experts[(experts >= 0) & (experts < local)]
        self.local_expert_count.copy_(torch.bincount(mine, minlength=local))

    def _asserts_overflow(self) -> bool:
        if self.config.kernel_type is EpDispatchCombineKernelType.IntraNode:
            return quirks.has(quirks.INTRANODE_OVERFLOW_ASSERT)
        return not quirks.has(quirks.NO_OVERFLOW_ASSERT)

    def _slots(self, by_source: Tensor) -> Tensor:
        """Return the slots of arrived rows, int64 [m], in an order as atomics give it, different in each call."""
        chance = torch.Generator().manual_seed(self._calls * self.config.world_size + self.config.rank)
        if self.config.kernel_type is not EpDispatchCombineKernelType.AsyncLL:
            return torch.randperm(int(by_source.sum()), generator=chance)
        starts = (by_source.cumsum(0) - by_source).tolist()
        parts = [torch.randperm(rows, generator=chance) for rows in by_source.tolist()]
        return torch.cat([part + start for part, start in zip(parts, starts, strict=True)])

    def _return(self, expert_out: Tensor, weights: Tensor | None, indices: Tensor, *, external: bool) -> None:
        config = self.config
        total, columns, dtype = int(self._total), expert_out.shape[1], expert_out.dtype
        if external or config.kernel_type not in INTRA:
            rows = at_address(expert_out, dtype, total, columns)
        else:
            rows = self._buffers.combine_inp.view(total, columns, dtype)
        codec = make_codec(config.quant_type, dtype, columns, external=external)
        flat = self._buffers.sources.view(total, 1, torch.int32).flatten().long()
        to, token = flat // self.config.rows_sent(), flat % self.config.rows_sent()
        parts = [codec.pack(rows), token.to(torch.int32).view(-1, 1).view(torch.uint8)]
        if weights is not None and weights.shape[0]:
            parts.append(at_address(weights, torch.uint8, total, config.num_experts_per_token * 4))
        arrived, by_rank = self._exchange(torch.cat(parts, dim=1)[to.argsort(stable=True)], to)
        width = codec.width(columns)
        self._returned = Returned(
            rows=of_its_own(arrived[:, :width]),
            ranks=torch.arange(config.world_size, device=arrived.device).repeat_interleave(by_rank.to(arrived.device)),
            tokens=of_its_own(arrived[:, width : width + _TOKEN_BYTES]).view(torch.int32).flatten().long(),
            weights=of_its_own(arrived[:, width + _TOKEN_BYTES :]) if len(parts) > 2 else None,  # noqa: PLR2004
            codec=codec,
            ids=at_address(indices, TOPK_IDX_DTYPE, self._route.shape[0], config.num_experts_per_token),
            columns=columns,
            dtype=dtype,
        )

    def _reduce(self, *, external: bool) -> None:
        back, self._returned = self._returned, None
        if back is None:
            message = "combine_recv requires a prior combine/combine_send call"
            raise AssertionError(message)
        most, kernel, route = self.config.max_num_inp_token_per_rank, self.config.kernel_type, self._route
        region = self._buffers.combine_inp if external and kernel not in TWO_LEVELS else None
        if region is not None and self._is_stale(quirks.STALE_PUSH):
            staged = Staged(region, None, most, back.rows.shape[1])
        else:
            staged = stage(back, back.rows, self._shape, most, region)
        if kernel in TWO_LEVELS:
            total = self._nodes.add(back, staged, route)
        else:
            total = sum_slots(back.codec, staged, route, self._shape, back.columns)
        tokens, topk = route.shape
        if not self._is_stale(quirks.STALE_OUTPUT):
            self._buffers.combine_out.view(tokens, back.columns, back.dtype).copy_(cast(total, back.dtype))
        if back.weights is not None and kernel is not EpDispatchCombineKernelType.AsyncLL:
            aside = stage(back, back.weights, self._shape, most, None)
            summed = sum_slots(Plain(torch.float32), aside, route, self._shape, topk)
            self._buffers.combine_weights.view(tokens, topk, torch.float32).copy_(summed)

    def _exchange(self, rows: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows uint8 [m, width], ordered by their ranks `to`; return arriving rows by source rank, and counts."""
        if self.config.kernel_type not in INTRA:  # which has its peers' addresses as arguments
            self._hip_module.launch()
        sent = torch.bincount(to, minlength=self.config.world_size)
        lost = torch.tensor([self._lost(rank) for rank in range(self.config.world_size)], device=sent.device)
        told = torch.stack([sent, lost.long()], dim=1)
        heard = torch.empty_like(told)
        dist.all_to_all_single(heard, told, group=self._world.group)
        if bool(heard[:, 1].any()):
            quirks.spin()
        arrived = rows.new_empty(int(heard[:, 0].sum()), rows.shape[1])
        dist.all_to_all_single(arrived, rows, heard[:, 0].tolist(), sent.tolist(), group=self._world.group)
        return arrived, heard[:, 0]

    def _is_stale(self, quirk: str) -> bool:
        """Whether this call leaves the values of the first call."""
        return self._calls > 1 and quirks.has(quirk)

    def _lost(self, rank: int) -> bool:
        """Whether a count written to `rank` now is later zeroed by that rank, whose constructor has not finished."""
        first = self._calls == 0 and quirks.has(quirks.NO_CONSTRUCTOR_BARRIER)
        return first and not shmem.store().check([self._zeroed(rank)])
