"""The receive buffer of a case, into which rows are copied that DeepEP returns in tensors of their own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from distbench.errors import DistbenchError
from distbench.transport.base import Dispatched, poison_
from distbench.workload.batch import TokenBatch


class ReceiveBuffer:
    """Buffers of `capacity` rows like those of a batch, poisoned; `rows` counts those that were received last."""

    def __init__(self, like: TokenBatch, capacity: int, rank: int) -> None:
        self._rank, self._capacity = rank, capacity
        self.rows = 0
        fields = [None if one is None else one.new_empty(capacity, one.shape[1]) for one in like]
        hidden, scales, weights, ids = fields
        assert hidden is not None and weights is not None and ids is not None  # noqa: S101, PT018 - a batch has them
        self.held = Dispatched(hidden, scales, weights, ids, ids.new_zeros(1))
        self.poison()

    def take(self, parts: Sequence[Tensor | None]) -> Dispatched:
        """Copy received rows: hidden, scales or None, weights and ids.

        Raises:
            DistbenchError: more rows than the buffer has.
        """
        found = [part for part in parts if part is not None]
        rows = len(found[0])
        if rows > self._capacity:
            message = (
                f"dispatch: rank {self._rank} received {rows} rows, its buffer has {self._capacity}; raise "
                "prealloc_max_recv_tokens or max_dispatch_tokens_per_rank"
            )
            raise DistbenchError(message)
        for mine, part in zip(self.held.fields(), found, strict=True):
            mine[:rows].copy_(part)
        self.held.total_recv.fill_(rows)
        self.rows = rows
        return self.held

    def poison(self) -> None:
        """Overwrite all rows."""
        for mine in self.held.fields():
            poison_(mine)


def whole(expert_out: Tensor, received: int) -> Tensor:
    """Return `received` contiguous rows; those past the end of `expert_out`, which a cut left out, are poison."""
    if len(expert_out) >= received:
        return expert_out[:received].contiguous()
    missing = expert_out.new_empty(received - len(expert_out), expert_out.shape[1])
    poison_(missing)
    return torch.cat([expert_out, missing])


def package_ids(ids: Tensor, num_experts: int, dtype: torch.dtype) -> Tensor:
    """Return ids [n, k] in DeepEP's dtype, -1 where they name no expert."""
    return ids.where((ids >= 0) & (ids < num_experts), -1).to(dtype)
