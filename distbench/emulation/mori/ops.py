"""`mori.ops`: the configuration and the operator, with the wheel's names, signatures and defaults.

Nothing is validated that the package does not validate. Kernels take addresses: what a tensor is said to be is not
looked at, only the bytes from its start on.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.emulation.mori import habits, shmem
from distbench.emulation.mori.codec import Codec, Plain, make_codec
from distbench.emulation.mori.heap import Region
from distbench.emulation.mori.routing import (
    INTRA,
    TWO_LEVELS,
    EpDispatchCombineKernelType,
    Shape,
    owners,
    representatives,
)

__all__ = ["EpDispatchCombineConfig", "EpDispatchCombineKernelType", "EpDispatchCombineOp"]

TOPK_IDX_DTYPE = torch.int32
QUANT_TYPES = ("none", "fp8_direct_cast", "fp8_blockwise", "fp4_blockwise")

_BLOCKWISE = ("fp8_blockwise", "fp4_blockwise")
_PAST_THE_END = 0x7F
_TOKEN_BYTES = 4
_numbers: dict[str, count[int]] = {}


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


class _Sent(NamedTuple):
    """Rows that have arrived, uint8 [m, width], in order of their source ranks; by_source int64 [W] counts them."""

    rows: Tensor
    by_source: Tensor
    payload: int
    scales: int


class _Returned(NamedTuple):
    """Expert rows that have come back, uint8 [m, width], each with the rank it comes from and the token it is for."""

    rows: Tensor
    ranks: Tensor
    tokens: Tensor
    weights: Tensor | None
    codec: Codec
    ids: Tensor
    columns: int
    dtype: torch.dtype


class _Buffers(NamedTuple):
    """Regions of the heap, in the order in which the package allocates them."""

    combine_inp: Region
    dispatch_out: Region
    combine_out: Region
    weights: Region
    combine_weights: Region
    scales: Region
    ids: Region
    sources: Region


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
        self._buffers = self._allocate()
        self._shape = Shape(config.kernel_type, config.world_size, config.num_experts_per_rank)
        self._total = torch.zeros(1, dtype=TOPK_IDX_DTYPE, device=self._world.heap.bytes.device)
        self._partials: Tensor | None = None
        self._sent: _Sent | None = None
        self._returned: _Returned | None = None
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
        return self.config.world_size * self.config.max_num_inp_token_per_rank

    def max_num_tokens_to_recv_per_rank(self) -> int:
        """Return R / W."""
        most, cap = self.config.max_num_inp_token_per_rank, self.config.max_total_recv_tokens
        return min(-(-cap // self.config.world_size), most) if cap > 0 else most

    def max_num_tokens_to_recv(self) -> int:
        """Return R."""
        return self.config.world_size * self.max_num_tokens_to_recv_per_rank()

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
        ids = _memory(indices, TOPK_IDX_DTYPE, tokens, topk)
        has_scales = scales is not None and self.config.scale_dim > 0
        parts = [_memory(input, torch.uint8, tokens, columns * input.element_size())]
        if weights is None and self.config.kernel_type not in INTRA and tokens:
            habits.trap("memory access fault: address 0 (weights)")
        parts.append(_bytes(weights, torch.float32, tokens, topk))
        parts.append(ids.contiguous().view(torch.uint8))
        if has_scales:
            parts.append(_bytes(scales, torch.uint8, tokens, self.config.scale_dim * self.config.scale_type_size))
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
        if quant not in _BLOCKWISE:
            return
        allowed = (*INTRA, EpDispatchCombineKernelType.AsyncLL) if quant == "fp8_blockwise" else INTRA
        if kernel not in allowed or rows.dtype is not torch.bfloat16 or not external:
            message = f"{quant} combine: not with {kernel}, {rows.dtype}, use_external_inp_buf={external}"
            raise ValueError(message)

    def _allocate(self) -> _Buffers:
        config, malloc = self.config, self._world.heap.malloc
        rows, most = self.max_num_tokens_to_recv(), self.max_num_tokens_to_send()
        payload, topk = config.hidden_dim * config.max_token_type_size, config.num_experts_per_token
        scales = config.scale_dim * config.scale_type_size
        staged = most if config.kernel_type is EpDispatchCombineKernelType.AsyncLL else rows
        slot = payload + 8 * topk + 4 + scales
        if config.kernel_type is EpDispatchCombineKernelType.IntraNode and config.quant_type in _BLOCKWISE:
            slot = (
                payload
                + 8 * topk
                + 4
                + make_codec(config.quant_type, torch.bfloat16, config.hidden_dim, external=True).width(0)
            )
        return _Buffers(
            combine_inp=malloc(staged * slot),
            dispatch_out=malloc(rows * payload),
            combine_out=malloc(config.max_num_inp_token_per_rank * payload),
            weights=malloc(rows * topk * 4),
            combine_weights=malloc(rows * topk * 4),
            scales=malloc(rows * scales),
            ids=malloc(rows * topk * 4),
            sources=malloc(most * config.num_experts_per_rank * 4),
        )

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
            rows = _memory(expert_out, dtype, total, columns)
        else:
            rows = self._buffers.combine_inp.view(total, columns, dtype)
        codec = make_codec(config.quant_type, dtype, columns, external=external)
        flat = self._buffers.sources.view(total, 1, torch.int32).flatten().long()
        to, token = flat // self.max_num_tokens_to_send(), flat % self.max_num_tokens_to_send()
        parts = [codec.pack(rows), token.to(torch.int32).view(-1, 1).view(torch.uint8)]
        if weights is not None and weights.shape[0]:
            parts.append(_memory(weights, torch.uint8, total, config.num_experts_per_token * 4))
        arrived, by_rank = self._exchange(torch.cat(parts, dim=1)[to.argsort(stable=True)], to)
        width = codec.width(columns)
        self._returned = _Returned(
            rows=arrived[:, :width].contiguous(),
            ranks=torch.arange(config.world_size, device=arrived.device).repeat_interleave(by_rank.to(arrived.device)),
            tokens=arrived[:, width : width + _TOKEN_BYTES].contiguous().view(torch.int32).flatten().long(),
            weights=arrived[:, width + _TOKEN_BYTES :].contiguous() if len(parts) > 2 else None,  # noqa: PLR2004
            codec=codec,
            ids=_memory(indices, TOPK_IDX_DTYPE, self._route.shape[0], config.num_experts_per_token),
            columns=columns,
            dtype=dtype,
        )

    def _reduce(self, *, external: bool) -> None:
        back, self._returned = self._returned, None
        if back is None:
            message = "combine_recv requires a prior combine/combine_send call"
            raise AssertionError(message)
        staged = self._staged(back, in_heap=external and self.config.kernel_type not in TWO_LEVELS)
        if self.config.kernel_type in TWO_LEVELS:
            total = self._two_levels(back, staged)
        else:
            total = self._sum(back.codec, staged, self._route, back.columns)
        tokens = self._route.shape[0]
        self._buffers.combine_out.view(tokens, back.columns, back.dtype).copy_(_cast(total, back.dtype))
        if back.weights is not None and self.config.kernel_type is not EpDispatchCombineKernelType.AsyncLL:
            plain, topk = back._replace(rows=back.weights), self.config.num_experts_per_token
            summed = self._sum(Plain(torch.float32), self._staged(plain, in_heap=False), self._route, topk)
            self._buffers.combine_weights.view(tokens, topk, torch.float32).copy_(summed)

    def _staged(self, back: _Returned, *, in_heap: bool) -> _Staged:
        """Lay rows where the sum finds them: at (expert rank * M + token) of this rank's combine buffer, or aside."""
        most = self.config.max_num_inp_token_per_rank
        place = back.ranks * most + back.tokens
        if in_heap:
            self._buffers.combine_inp.put(place, back.rows)
            return _Staged(self._buffers.combine_inp, None, most, back.rows.shape[1])
        index = back.tokens.new_zeros(self.config.world_size * most + 1)
        index[place] = torch.arange(place.numel(), device=place.device)
        return _Staged(back.rows, index, most, back.rows.shape[1])

    def _sum(self, codec: Codec, staged: _Staged, route: Tensor, columns: int) -> Tensor:
        """Return float32 [n, columns]: contributions added from +0.0 in slot order."""
        total = torch.zeros(route.shape[0], columns, device=route.device)
        for slot in range(route.shape[1]):
            token = (route[:, slot] < self.config.world_size).nonzero().flatten()
            if token.numel():
                total[token] = codec.add(total[token], staged.rows(route[token, slot], token))
        return total

    def _two_levels(self, back: _Returned, staged: _Staged) -> Tensor:
        """Sum within each node, round, then sum over nodes in their order.

        Which nodes take part is read from the ids that combine is given; a node that was sent nothing has what an
        earlier call left there.
        """
        config = self.config
        nodes, tokens = config.world_size // config.gpu_per_node, self._route.shape[0]
        if self._partials is None or self._partials.shape[2] != back.columns:
            self._partials = torch.zeros(nodes, max(config.max_num_inp_token_per_rank, tokens), back.columns)
            self._partials = self._partials.to(self._route.device)
        asked = owners(back.ids, self._shape) // config.gpu_per_node
        total = torch.zeros(tokens, back.columns, device=self._route.device)
        for node in range(nodes):
            route = self._route.masked_fill(self._route // config.gpu_per_node != node, config.world_size)
            sent = (route < config.world_size).any(1).nonzero().flatten()
            self._partials[node, sent] = back.codec.round(self._sum(back.codec, staged, route, back.columns))[sent]
            adding = (asked == node).any(1).nonzero().flatten()
            total[adding] += self._partials[node, adding]
        return total

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


class _Staged(NamedTuple):
    """Where a rank's contribution to a token lies: in a region of the heap, or in rows that `places` points into."""

    source: Region | Tensor
    places: Tensor | None
    most: int
    width: int

    def rows(self, ranks: Tensor, tokens: Tensor) -> Tensor:
        """Return uint8 [m, width] of the contributions of ranks [m] to tokens [m]."""
        place = ranks * self.most + tokens
        if isinstance(self.source, Region):
            return self.source.take(place, self.width)
        return self.source[place if self.places is None else self.places[place]]


def _memory(tensor: Tensor, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    """Return what lies at a tensor's address, whatever it is said to be; past its memory's end, rubbish."""
    storage = torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
    start, wanted = tensor.storage_offset() * tensor.element_size(), rows * columns * dtype.itemsize
    found = storage[start : start + wanted]
    if found.numel() < wanted:
        found = torch.cat([found, found.new_full((wanted - found.numel(),), _PAST_THE_END)])
    return found.view(dtype).view(rows, columns)


def _bytes(tensor: Tensor | None, dtype: torch.dtype, rows: int, columns: int) -> Tensor:
    width = columns * dtype.itemsize
    if tensor is None:
        return torch.zeros(rows, width, dtype=torch.uint8)
    return _memory(tensor, torch.uint8, rows, width)


def _cast(total: Tensor, dtype: torch.dtype) -> Tensor:
    return total.clamp(-448.0, 448.0).to(dtype) if dtype.itemsize == 1 else total.to(dtype)
