"""DeepEP's low-latency kernels: `low_latency_dispatch` and `low_latency_combine`, mapped to one row a token and rank.

They send a row to each expert of a token, without ids and weights, and add the experts' rows with weights that the
sender keeps. What that leaves to compare is in docs/deepep.md.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from distbench.distributed.waits import collective
from distbench.errors import DistbenchError
from distbench.transport.base import Dispatched, TransportContext, poison_
from distbench.transport.deepep.arrivals import Arrivals, Routing, read_arrivals
from distbench.transport.deepep.common import DeepEpTransport
from distbench.transport.deepep.package import Package
from distbench.transport.deepep.receive import package_ids, whole
from distbench.workload.batch import TokenBatch


class _Back(NamedTuple):
    """What combine needs of a dispatch: DeepEP's handle, and the rows that arrived."""

    handle: Any
    arrivals: Arrivals


class LowLatencyTransport(DeepEpTransport):
    """Dispatch and combine by low-latency kernels: see `Transport` for the contract.

    Rows of one token are one row of the receive buffer; their copies have to be equal, else the row is poison. On the
    way back one of them, of the token's first slot on the rank, carries the sum over the rank's experts, and all others
    are poison, which combine must not read.
    """

    def __init__(self, context: TransportContext, package: Package) -> None:
        """Make the buffer. Collective.

        Raises:
            Unsupported: see `Package.low_latency`.
        """
        case = context.case
        self._group, self._most = context.group, case.max_dispatch_tokens_per_rank
        sizes = case.ep_size, self._most, case.hidden_size, case.placed_experts
        super().__init__(context, package, package.low_latency(context.group, *sizes))
        self._returning: Tensor | None = None
        self._back: _Back | None = None
        self.facts = {"kernel": "low-latency", "deep_ep": package.version}

    def dispatch(self, batch: TokenBatch) -> Dispatched:
        """See `Transport.dispatch`. The ranks gather ids and weights beside it, which the kernels do not send.

        Raises:
            DistbenchError: rows that contradict themselves: see `read_arrivals`.
        """
        case = self._case
        routing = self._gathered(batch)
        with collective("dispatch of deepep", batch.ids.get_device()):
            rows, counts, handle, _, _ = self._buffer.low_latency_dispatch(
                batch.hidden,
                package_ids(batch.ids, case.placed_experts, self._package.ids_dtype),
                self._most,
                case.placed_experts,
                use_fp8=False,
                async_finish=False,
                return_recv_hook=False,
            )
        arrivals = read_arrivals(rows, counts, handle[0], handle[1], routing)
        self._back, self._last = _Back(handle, arrivals), [rows]
        return self._received.take((arrivals.hidden, None, arrivals.weights, arrivals.ids))

    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        """See `Transport.combine`."""
        handle, arrivals = self._taken()
        if self._returning is None:
            experts, places = self._case.experts_per_rank, self._case.ep_size * self._most
            self._returning = expert_out.new_empty(experts, places, expert_out.shape[1])
            poison_(self._returning)
        flat = self._returning.view(-1, expert_out.shape[1])
        flat[arrivals.places] = float("nan")
        flat[arrivals.carriers] = whole(expert_out, self._received.rows)
        with collective("combine of deepep", expert_out.get_device()):
            tokens: Tensor = self._buffer.low_latency_combine(
                self._returning,
                self._first_of_rank(ids).to(self._package.ids_dtype),
                torch.ones(ids.shape, device=ids.device),
                handle,
                use_logfmt=False,
                zero_copy=False,
                async_finish=False,
                return_recv_hook=False,
            )[0]
        self._back = None
        self._last.append(tokens)
        return tokens.clone()

    def sources(self) -> Tensor:
        """See `Transport.sources`."""
        return self._taken().arrivals.sources

    def _gathered(self, batch: TokenBatch) -> Routing:
        """All ranks' ids and weights, gathered. Collective."""
        case = self._case
        mine = batch.ids.new_full((max(case.tokens), 2 * case.topk_slots), -1)
        mine[: len(batch.ids), : case.topk_slots] = batch.ids
        mine[: len(batch.ids), case.topk_slots :] = batch.weights.view(torch.int32)
        table = mine.new_empty(case.ep_size, *mine.shape)
        with collective("all_gather", mine.get_device()):
            dist.all_gather([*table.unbind(0)], mine, group=self._group)
        ids, weights = table.split(case.topk_slots, dim=2)
        first = self._rank * case.experts_per_rank
        return Routing(ids, weights.contiguous().view(torch.float32), first, self._most)

    def _first_of_rank(self, ids: Tensor) -> Tensor:
        """Return ids [n, k] with -1 in all but the first slot of each rank, and in those of no expert."""
        known = (ids >= 0) & (ids < self._case.placed_experts)
        owner = ids.div(self._case.experts_per_rank, rounding_mode="floor").where(known, -1)
        earlier = (owner.unsqueeze(2) == owner.unsqueeze(1)).tril(-1).any(2)
        return ids.where(known & ~earlier, -1)

    def _taken(self) -> _Back:
        if self._back is None:
            message = "sources() or combine() was called without a dispatch; the two strictly alternate"
            raise DistbenchError(message)
        return self._back
