"""DeepEP's normal kernels between the ranks of a host: `Buffer.dispatch` and `Buffer.combine`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distbench.distributed.waits import collective
from distbench.errors import DistbenchError, Unsupported
from distbench.transport.base import Dispatched, TransportContext
from distbench.transport.deepep.common import DeepEpTransport
from distbench.transport.deepep.package import Package
from distbench.transport.deepep.receive import package_ids, whole
from distbench.transport.sum_order import SumOrder
from distbench.workload.batch import TokenBatch


class _Handle(NamedTuple):
    """DeepEP's handle of a dispatch within a host, as its module legacy packs it."""

    rank_prefix: Tensor
    """int32 [W, W]: rows that ranks up to i send to rank j."""
    channel_prefix: Tensor
    received_channel_prefix: Tensor
    source_tokens: Tensor
    """int32 [total_recv]; rows lie by source rank."""
    in_rank: Tensor
    send_head: Tensor


class NormalTransport(DeepEpTransport):
    """Dispatch and combine by normal kernels: see `Transport` for the contract.

    DeepEP sends a row once to each rank, with the ids and weights of that rank's experts alone; returns received rows
    in tensors of their own, of which it waits for the number; and adds what ranks return in the order of their numbers.
    """

    sum_order = SumOrder(by_rank=True)

    def __init__(self, context: TransportContext, package: Package) -> None:
        """Make the buffer. Collective.

        Raises:
            Unsupported: see `Package.normal`; or the ranks are on several hosts.
        """
        case, session = context.case, context.session
        if session.local_ranks < case.ep_size:
            message = f"transport deepep: {session.local_ranks} of {case.ep_size} ranks are on this host; use one host"
            raise Unsupported(message)
        super().__init__(context, package, package.normal(context.group, case.ep_size, case.hidden_size * 2))
        self._handle: _Handle | None = None
        self.facts = {"kernel": "normal", "deep_ep": package.version, "num_sms": package.buffer.num_sms}

    def dispatch(self, batch: TokenBatch) -> Dispatched:
        """See `Transport.dispatch`.

        Raises:
            DistbenchError: more rows than the receive buffer has.
        """
        experts = self._case.placed_experts
        ids = package_ids(batch.ids, experts, self._package.ids_dtype)
        with collective("dispatch of deepep", batch.ids.get_device()):
            per_rank, per_rdma_rank, per_expert, in_rank, _ = self._buffer.get_dispatch_layout(ids, experts)
            rows, local, weights, _, handle, _ = self._buffer.dispatch(
                batch.hidden if batch.scales is None else (batch.hidden, batch.scales),
                num_tokens_per_rank=per_rank,
                num_tokens_per_rdma_rank=per_rdma_rank,
                is_token_in_rank=in_rank,
                num_tokens_per_expert=per_expert,
                topk_idx=ids,
                topk_weights=batch.weights,
            )
        self._handle = _Handle(*handle)
        hidden, scales = (rows, None) if batch.scales is None else rows
        here = local.where(local < 0, local + self._rank * self._case.experts_per_rank)
        self._last = [part for part in (hidden, scales, weights, local) if part is not None]
        return self._received.take((hidden, scales, weights, here.int()))

    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:  # noqa: ARG002 - the handle has the routing
        """See `Transport.combine`."""
        handle = self._taken()
        with collective("combine of deepep", expert_out.get_device()):
            tokens: Tensor = self._buffer.combine(whole(expert_out, self._received.rows), tuple(handle))[0]
        self._handle = None
        self._last.append(tokens)
        return tokens.clone()

    def sources(self) -> Tensor:
        """See `Transport.sources`."""
        handle = self._taken()
        tokens = handle.source_tokens.long()
        ends = handle.rank_prefix[:, self._rank].long().contiguous()
        places = torch.arange(len(tokens), device=tokens.device)
        return torch.stack([torch.searchsorted(ends, places, right=True), tokens], dim=1)

    def _taken(self) -> _Handle:
        if self._handle is None:
            message = "sources() or combine() was called without a dispatch; the two strictly alternate"
            raise DistbenchError(message)
        return self._handle
