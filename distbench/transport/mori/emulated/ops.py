"""`mori.ops`: the configuration and the operator, with the wheel's names, signatures and defaults.

Nothing is validated that the package does not validate. Kernels take addresses: a tensor's dtype and shape are ignored,
only the bytes from its start count.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from distbench.transport.mori.emulated import _jit_loader, quirks  # noqa: F401 - exported here, as in the package
from distbench.transport.mori.emulated.buffers import BLOCKWISE, EpDispatchCombineConfig
from distbench.transport.mori.emulated.heap import at_address
from distbench.transport.mori.emulated.moves import TOPK_IDX_DTYPE, RowMoves
from distbench.transport.mori.emulated.routing import INTRA, EpDispatchCombineKernelType, representatives
from distbench.workload.quantize import fp8_dtype

__all__ = [
    "EpDispatchCombineConfig",
    "EpDispatchCombineKernelType",
    "EpDispatchCombineOp",
    "launch_local_expert_count",
]

NOT_IMITATED = (
    *("dispatch_standard_moe", "combine_standard_moe", "convert_dispatch_output", "convert_combine_input"),
    *("get_debug_time_buf", "get_debug_time_offset"),
)
"""Methods of the package's operator that raise NotImplementedError here."""


class EpDispatchCombineOp(RowMoves):
    """One operator. Construction is collective.

    `local_expert_count` int32 [El] holds the counts of the last call that was asked to count.
    """

    def __getattr__(self, name: str) -> Any:
        """Report a method of the package that is not imitated."""
        if name in NOT_IMITATED:
            quirks.refuse(name)
        message = f"{type(self).__name__!r} object has no attribute {name!r}"
        raise AttributeError(message)

    def get_launch_config(
        self,
        is_dispatch: bool = True,  # noqa: ARG002, FBT001, FBT002 - the wheel's; without tables both phases are alike
        block_num: int = -1,
        rdma_block_num: int = -1,
        warp_per_block: int = -1,
    ) -> tuple[int, int, int]:
        """Return block_num, rdma_block_num and warp_per_block as given, or as AUTO sets them."""
        return self._launches.asked((block_num, rdma_block_num, warp_per_block))

    def decode_send_flat_idx(self, flat_idx: int) -> tuple[int, int]:
        """Return source rank and source token of a source position."""
        return divmod(int(flat_idx), self.max_num_tokens_to_send())

    def max_num_tokens_to_send_per_rank(self) -> int:
        """Return M."""
        return self.config.max_num_inp_token_per_rank

    def max_num_tokens_to_send(self) -> int:
        """Return W * M, the number of source positions per rank."""
        return self.config.rows_sent()

    def max_num_tokens_to_recv_per_rank(self) -> int:
        """Return R / W."""
        return self.config.rows_received_per_rank()

    def max_num_tokens_to_recv(self) -> int:
        """Return R."""
        return self.config.rows_received()

    def get_registered_combine_input_buffer(self, dtype: torch.dtype, hidden_dim: int = -1) -> Tensor:
        """Return the view [R, hidden] that combine reads when no external buffer is used."""
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
        block_num: int = -1,
        rdma_block_num: int = -1,
        warp_per_block: int = -1,
        call_local_expert_count: bool = False,  # noqa: FBT001, FBT002
        *,
        routing: object = None,
        return_routing: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """Send rows to the ranks of their experts; return the received hidden, weights, scales, ids and their number.

        All are views. AsyncLL only sends here; `dispatch_recv` fills them, and counts.

        Raises:
            NotImplementedError: a routing handle is given or requested.
            RuntimeError: an fp8 format other than the device's, for which no kernel is compiled.
        """
        _check_kernels(input.dtype)
        if routing is not None or return_routing:
            quirks.refuse("a routing handle")
        asked = (block_num, rdma_block_num, warp_per_block)
        self._cached_dispatch_launch = self._launches.taken(asked, dispatch=True)
        tokens, columns, topk = input.shape[0], input.shape[1], self.config.num_experts_per_token
        ids = at_address(indices, TOPK_IDX_DTYPE, tokens, topk)
        has_scales = scales is not None and self.config.scale_dim > 0
        parts = [at_address(input, torch.uint8, tokens, columns * input.element_size())]
        if weights is None and self.config.kernel_type not in INTRA and tokens:
            quirks.trap("memory access fault: address 0 (weights)")
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
            if call_local_expert_count:
                self._count_local()
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
        call_local_expert_count: bool = False,  # noqa: ARG002, FBT001, FBT002 - the wheel does not pass it on
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        """See `dispatch`."""
        return self.dispatch(input, weights, scales, indices, block_num=block_num, warp_per_block=warp_per_block)

    def dispatch_recv(
        self,
        block_num: int = -1,  # noqa: ARG002
        warp_per_block: int = -1,  # noqa: ARG002
        call_local_expert_count: bool = False,  # noqa: FBT001, FBT002
    ) -> None:
        """Fill the views that `dispatch` returned; AsyncLL only."""
        self._only_async("dispatch_recv")
        self._receive()
        if call_local_expert_count:
            self._count_local()

    def combine(  # noqa: PLR0913 - the wheel's signature
        self,
        input: Tensor,  # noqa: A002
        weights: Tensor | None,
        indices: Tensor,
        block_num: int = -1,
        rdma_block_num: int = -1,
        warp_per_block: int = -1,
        use_external_inp_buf: int = -1,
        call_reset: bool = False,  # noqa: ARG002, FBT001, FBT002 - does nothing in the package either
        *,
        routing: object = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return the sum of this rank's tokens: views [M, H], and [M, k] where weights are given.

        AsyncLL only sends here; `combine_recv` fills the views.

        Raises:
            ValueError: refused by the package: ids with other rows than were dispatched, or blocks without support.
            NotImplementedError: a routing handle; or the registered buffer where kernels write to it as they read it.
        """
        if routing is not None:
            quirks.refuse("a routing handle")
        if self.config.kernel_type not in INTRA and self._buffers.combine_inp.begins_at(input):
            quirks.refuse(
                f"the registered buffer as what {self.config.kernel_type} reads, which overwrites it meanwhile,"
            )
        asked = (block_num, rdma_block_num, warp_per_block)
        self._cached_combine_launch = self._launches.taken(asked, dispatch=False)
        tokens = self._route.shape[0]
        if indices.shape[0] != tokens and not quirks.has(quirks.NO_ROW_GUARD):
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
        """Fill the views that `combine` returned; AsyncLL only."""
        self._only_async("combine_recv")
        self._reduce(external=True)

    def reset(self) -> None:
        """Do nothing, like the package."""

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


def _check_kernels(dtype: torch.dtype) -> None:
    if dtype.is_floating_point and dtype.itemsize == 1 and dtype is not fp8_dtype(quirks.fp8_format()):
        message = f"hipModuleGetFunction (emulated): no kernel for {dtype}, the device has {quirks.fp8_format()}"
        raise RuntimeError(message)


def launch_local_expert_count(  # noqa: PLR0913 - the wheel's signature
    config: object,  # noqa: ARG001
    indices_ptr: int,  # noqa: ARG001
    total_recv_token_num_ptr: int,  # noqa: ARG001
    local_expert_count_ptr: int,  # noqa: ARG001
    block_num: int = -1,  # noqa: ARG001
    warp_per_block: int = -1,  # noqa: ARG001
    stream: int = 0,  # noqa: ARG001
) -> NoReturn:
    """Raise NotImplementedError: it takes device addresses; `call_local_expert_count` of a call counts here."""
    quirks.refuse("launch_local_expert_count")
