"""`mori.ops`: the configuration and the operator, with the wheel's names, signatures and defaults.

Nothing is validated that the package does not validate. Kernels take addresses: what a tensor is said to be is not
looked at, only the bytes from its start on.
"""

from __future__ import annotations

from itertools import count
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.emulation.mori import habits, shmem
from distbench.emulation.mori.buffers import BLOCKWISE, EpDispatchCombineConfig, allocate
from distbench.emulation.mori.codec import Plain, make_codec
from distbench.emulation.mori.heap import at_address
from distbench.emulation.mori.routing import (
    INTRA,
    TWO_LEVELS,
    EpDispatchCombineKernelType,
    Shape,
    owners,
    representatives,
)
from distbench.emulation.mori.sums import NodeSums, Returned, cast, stage, sum_slots

__all__ = ["EpDispatchCombineConfig", "EpDispatchCombineKernelType", "EpDispatchCombineOp"]

TOPK_IDX_DTYPE = torch.int32
QUANT_TYPES = ("none", "fp8_direct_cast", "fp8_blockwise", "fp4_blockwise")

_TOKEN_BYTES = 4
_numbers: dict[str, count[int]] = {}


class _Sent(NamedTuple):
    """Rows that have arrived, uint8 [m, width], in order of their source ranks; by_source int64 [W] counts them."""

    rows: Tensor
    by_source: Tensor
    payload: int
    scales: int


class EpDispatchCombineOp:
    """One operator: its buffers, and the counter of received rows. Construction is collective."""

    def __init__(self, config: EpDispatchCombineConfig) -> None:
        """Allocate; ranks wait for each other on the default process group, as in the package."""
        if config.quant_type not in QUANT_TYPES:
            message = f"invalid quant_type '{config.quant_type}', expected one of {list(QUANT_TYPES)}"
            raise ValueError(message)
        if config.world_size % config.gpu_per_node or config.gpu_per_node & (config.gpu_per_node - 1):
            habits.trap("assertion failed: IsPowerOf2(gpuPerNode) && worldSize % gpuPerNode == 0")
        self.config = config
        self._world = shmem.world()
        dist.barrier()
        self._buffers = allocate(self._world.heap, config)
        self._shape = Shape(config.kernel_type, config.world_size, config.num_experts_per_rank)
        self._total = torch.zeros(1, dtype=TOPK_IDX_DTYPE, device=self._world.heap.bytes.device)
        self._nodes = NodeSums(self._shape, config.gpu_per_node, config.max_num_inp_token_per_rank)
        self._sent: _Sent | None = None
        self._returned: Returned | None = None
        self._route = torch.empty(0, config.num_experts_per_token, dtype=torch.long)
        self._calls = 0
        self._number = next(_numbers.setdefault(self._world.name, count()))
        shmem.store().set(self._zeroed(self.config.rank), "")
        if not habits.has(habits.NO_CONSTRUCTOR_BARRIER):
            dist.barrier()

    def __del__(self) -> None:
        """Give the buffers back while the heap is still there."""
        if hasattr(self, "_buffers"):
            self._world.heap.free(len(self._buffers))

    def max_num_tokens_to_send_per_rank(self) -> int:
        """Return M."""
        return self.config.max_num_inp_token_per_rank

    def max_num_tokens_to_send(self) -> int:
        """Return W * M, also what source positions count a rank by."""
        return self.config.rows_sent()

    def max_num_tokens_to_recv_per_rank(self) -> int:
        """Return R / W."""
        return self.config.rows_received_per_rank()

    def max_num_tokens_to_recv(self) -> int:
        """Return R."""
        return self.config.rows_received()

    def get_registered_combine_input_buffer(self, dtype: torch.dtype, hidden_dim: int = -1) -> Tensor:
        """Return the view [R, hidden] that combine reads where no external buffer is used."""
        columns = self.config.hidden_dim if hidden_dim < 0 else hidden_dim
        return self._buffers.combine_inp.view(self.max_num_tokens_to_recv(), columns, dtype)

    def get_dispatch_src_token_pos(self) -> Tensor:
        """Return int32 [total_recv], a view: source rank * (W * M) + source token of each received row."""
        return self._buffers.sources.view(int(self._total), 1, TOPK_IDX_DTYPE).flatten()

    def dispatch(  # noqa: PLR0913 - the wheel's signature
        self,
        input: Tensor,  # noqa: A002
        weights: Tensor | None,
        scales: Tensor | None,
        indices: Tensor,
        block_num: int = -1,  # noqa: ARG002 - geometry changes no value
        rdma_block_num: int = -1,  # noqa: ARG002
        warp_per_block: int = -1,  # noqa: ARG002
        call_local_expert_count: bool = False,  # noqa: ARG002, FBT001, FBT002
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Send rows to the ranks of their experts: the received hidden, weights, scales, ids and their number.

        All are views. AsyncLL only sends here; `dispatch_recv` fills them.
        """
        tokens, columns, topk = input.shape[0], input.shape[1], self.config.num_experts_per_token
        ids = at_address(indices, TOPK_IDX_DTYPE, tokens, topk)
        has_scales = scales is not None and self.config.scale_dim > 0
        parts = [at_address(input, torch.uint8, tokens, columns * input.element_size())]
        if weights is None and self.config.kernel_type not in INTRA and tokens:
            habits.trap("memory access fault: address 0 (weights)")
        width = 4 * topk
        parts.append(ids.new_zeros(tokens, width, dtype=torch.uint8))
        if weights is not None:
            parts[-1] = at_address(weights, torch.uint8, tokens, width)
        parts.append(ids.contiguous().view(torch.uint8))
        if scales is not None and has_scales:
            parts.append(at_address(scales, torch.uint8, tokens, self.config.scale_dim * self.config.scale_type_size))
        self._route = representatives(ids, self._shape)
        self._send(torch.cat(parts, dim=1), parts[0].shape[1], parts[3].shape[1] if has_scales else 0)
        if self.config.kernel_type is EpDispatchCombineKernelType.AsyncLL:
            self._total.zero_()
        else:
            self._receive()
        rows = self.max_num_tokens_to_recv()
        buffers = self._buffers
        return (
            buffers.dispatch_out.view(rows, columns, input.dtype),
            buffers.weights.view(rows, topk, torch.float32),
            buffers.scales.view(rows, self.config.scale_dim, scales.dtype)
            if scales is not None and has_scales
            else None,
            buffers.ids.view(rows, topk, TOPK_IDX_DTYPE),
            self._total,
        )

    def dispatch_send(  # noqa: PLR0913 - the wheel's signature
        self,
        input: Tensor,  # noqa: A002
        weights: Tensor | None,
        scales: Tensor | None,
        indices: Tensor,
        block_num: int = -1,
        warp_per_block: int = -1,
        call_local_expert_count: bool = False,  # noqa: ARG002, FBT001, FBT002
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """See `dispatch`."""
        return self.dispatch(input, weights, scales, indices, block_num=block_num, warp_per_block=warp_per_block)

    def dispatch_recv(
        self,
        block_num: int = -1,  # noqa: ARG002
        warp_per_block: int = -1,  # noqa: ARG002
        call_local_expert_count: bool = False,  # noqa: ARG002, FBT001, FBT002
    ) -> None:
        """Fill what `dispatch` returned: AsyncLL only."""
        self._only_async("dispatch_recv")
        self._receive()

    def combine(  # noqa: PLR0913 - the wheel's signature
        self,
        input: Tensor,  # noqa: A002
        weights: Tensor | None,
        indices: Tensor,
        block_num: int = -1,  # noqa: ARG002 - geometry changes no value
        rdma_block_num: int = -1,  # noqa: ARG002
        warp_per_block: int = -1,  # noqa: ARG002
        use_external_inp_buf: int = -1,
        call_reset: bool = False,  # noqa: ARG002, FBT001, FBT002 - does nothing in the package either
    ) -> tuple[Tensor, Tensor | None]:
        """Sum what came of this rank's tokens: views [M, H], and [M, k] where weights are given.

        AsyncLL only sends here; `combine_recv` fills them.
        """
        tokens = self._route.shape[0]
        if indices.shape[0] != tokens and not habits.has(habits.NO_ROW_GUARD):
            message = (
                f"combine() indices has {indices.shape[0]} rows but this rank dispatched {tokens} tokens. Pass this "
                "rank's own [num_tokens, topk] routing"
            )
            raise ValueError(message)
        external = bool(self.config.use_external_inp_buf if use_external_inp_buf < 0 else use_external_inp_buf)
        self._check_blockwise(input, external=external)
        self._return(input, weights, indices, external=external)
        if self.config.kernel_type is not EpDispatchCombineKernelType.AsyncLL:
            self._reduce(external=external)
            self._total.zero_()
        most, topk = self.config.max_num_inp_token_per_rank, self.config.num_experts_per_token
        combined = self._buffers.combine_out.view(most, input.shape[1], input.dtype)
        if weights is None or not weights.shape[0]:
            return combined, None
        return combined, self._buffers.combine_weights.view(most, topk, torch.float32)

    def combine_send(
        self,
        input: Tensor,  # noqa: A002
        weights: Tensor | None,
        indices: Tensor,
        block_num: int = -1,
        warp_per_block: int = -1,
    ) -> tuple[Tensor, Tensor | None]:
        """See `combine`."""
        return self.combine(input, weights, indices, block_num=block_num, warp_per_block=warp_per_block)

    def combine_recv(self, block_num: int = -1, warp_per_block: int = -1) -> None:  # noqa: ARG002
        """Fill what `combine` returned: AsyncLL only."""
        self._only_async("combine_recv")
        self._reduce(external=True)

    def reset(self) -> None:
        """Do nothing, as the package."""

    def _only_async(self, name: str) -> None:
        if self.config.kernel_type is not EpDispatchCombineKernelType.AsyncLL:
            message = f"{name} only supports AsyncLL, got kernel_type={self.config.kernel_type.value}"
            raise ValueError(message)

    def _check_blockwise(self, rows: Tensor, *, external: bool) -> None:
        quant, kernel = self.config.quant_type, self.config.kernel_type
        if quant not in BLOCKWISE:
            return
        allowed = (*INTRA, EpDispatchCombineKernelType.AsyncLL) if quant == "fp8_blockwise" else INTRA
        if kernel not in allowed or rows.dtype is not torch.bfloat16 or not external:
            message = f"{quant} combine: not with {kernel}, {rows.dtype}, use_external_inp_buf={external}"
            raise ValueError(message)

    def _zeroed(self, rank: int) -> str:
        return f"{self._world.name}/op{self._number}/{rank}"

    def _send(self, rows: Tensor, payload: int, scales: int) -> None:
        token, slot = (self._route < self.config.world_size).nonzero().unbind(1)
        to = self._route[token, slot]
        order = to.argsort(stable=True)
        flat = (self.config.rank * self.max_num_tokens_to_send() + token).to(torch.int32).view(-1, 1)
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
        if rows.shape[0] > self.max_num_tokens_to_recv() and self._asserts_overflow():
            habits.trap("assertion failed: Total recv token overflow: increase maxTotalRecvTokens")
        if self.config.kernel_type is EpDispatchCombineKernelType.AsyncLL:
            owners_of = owners(
                rows[:, sent.payload + ids : sent.payload + 2 * ids].contiguous().view(torch.int32), self._shape
            )
            if bool((owners_of == self.config.world_size).any()):
                habits.trap("assertion failed: (pe >= 0) && (pe < config.worldSize)")
        slots = self._slots(sent.by_source).to(rows.device)
        widths = (sent.payload, ids, ids, sent.scales, _TOKEN_BYTES)
        regions = (buffers.dispatch_out, buffers.weights, buffers.ids, buffers.scales, buffers.sources)
        for region, part in zip(regions, rows.split(widths, dim=1), strict=True):
            region.put(slots, part)
        self._total += rows.shape[0]

    def _asserts_overflow(self) -> bool:
        if self.config.kernel_type is EpDispatchCombineKernelType.IntraNode:
            return habits.has(habits.INTRANODE_OVERFLOW_ASSERT)
        return not habits.has(habits.NO_OVERFLOW_ASSERT)

    def _slots(self, by_source: Tensor) -> Tensor:
        """Return the slots of arrived rows, int64 [m]: an order as atomics make it, another one in each call."""
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
        to, token = flat // self.max_num_tokens_to_send(), flat % self.max_num_tokens_to_send()
        parts = [codec.pack(rows), token.to(torch.int32).view(-1, 1).view(torch.uint8)]
        if weights is not None and weights.shape[0]:
            parts.append(at_address(weights, torch.uint8, total, config.num_experts_per_token * 4))
        arrived, by_rank = self._exchange(torch.cat(parts, dim=1)[to.argsort(stable=True)], to)
        width = codec.width(columns)
        self._returned = Returned(
            rows=arrived[:, :width].contiguous(),
            ranks=torch.arange(config.world_size, device=arrived.device).repeat_interleave(by_rank.to(arrived.device)),
            tokens=arrived[:, width : width + _TOKEN_BYTES].contiguous().view(torch.int32).flatten().long(),
            weights=arrived[:, width + _TOKEN_BYTES :].contiguous() if len(parts) > 2 else None,  # noqa: PLR2004
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
        staged = stage(back, back.rows, self._shape, most, region)
        if kernel in TWO_LEVELS:
            total = self._nodes.add(back, staged, route)
        else:
            total = sum_slots(back.codec, staged, route, self._shape, back.columns)
        tokens, topk = route.shape
        self._buffers.combine_out.view(tokens, back.columns, back.dtype).copy_(cast(total, back.dtype))
        if back.weights is not None and kernel is not EpDispatchCombineKernelType.AsyncLL:
            aside = stage(back, back.weights, self._shape, most, None)
            summed = sum_slots(Plain(torch.float32), aside, route, self._shape, topk)
            self._buffers.combine_weights.view(tokens, topk, torch.float32).copy_(summed)

    def _exchange(self, rows: Tensor, to: Tensor) -> tuple[Tensor, Tensor]:
        """Send rows uint8 [m, width], in order of their ranks `to`: what arrives, in order of its ranks, and counts."""
        sent = torch.bincount(to, minlength=self.config.world_size)
        lost = torch.tensor([self._lost(rank) for rank in range(self.config.world_size)], device=sent.device)
        told = torch.stack([sent, lost.long()], dim=1)
        heard = torch.empty_like(told)
        dist.all_to_all_single(heard, told, group=self._world.group)
        if bool(heard[:, 1].any()):
            habits.spin()
        arrived = rows.new_empty(int(heard[:, 0].sum()), rows.shape[1])
        dist.all_to_all_single(arrived, rows, heard[:, 0].tolist(), sent.tolist(), group=self._world.group)
        return arrived, heard[:, 0]

    def _lost(self, rank: int) -> bool:
        """Whether a count that is written to `rank` now is zeroed by it later: its constructor is not through."""
        first = self._calls == 0 and habits.has(habits.NO_CONSTRUCTOR_BARRIER)
        return first and not shmem.store().check([self._zeroed(rank)])
