"""Row counts between ranks, and the order of arrival in the receive buffer."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from distbench.workload.bits import shuffles

# Orders of the receive buffer drawn in one call: a draw costs about 20 operations, for one order or for many. On a
# device they repeat in turn, so that no draw falls into a timed call; on a CPU these are the arms of a kind of inputs.
_DRAWN_ON_CPU, _DRAWN_ON_DEVICE = 4, 32


class Geometry(NamedTuple):
    """Sizes of one expert-parallel group. `counts` int64 [W, W] on the CPU: rows that rank i sends to rank j."""

    rank: int
    ep_size: int
    num_experts: int
    capacity: int
    counts: Tensor


class RowCounts:
    """Row counts of one rank: the totals sent and received, and by rank those that cross the wire."""

    def __init__(self, geometry: Geometry) -> None:
        rank = self.rank = geometry.rank
        self.sent: list[int] = geometry.counts[rank].tolist()
        self.received: list[int] = geometry.counts[:, rank].tolist()
        self.own = self.sent[rank]
        self.before_own = sum(self.received[:rank])
        self.total_sent, self.total_received = sum(self.sent), sum(self.received)
        self.to_peers = [0 if peer == rank else count for peer, count in enumerate(self.sent)]
        self.from_peers = [0 if peer == rank else count for peer, count in enumerate(self.received)]
        self.leaving, self.arriving = self.total_sent - self.own, self.total_received - self.own

    def source_ranks(self, device: torch.device) -> Tensor:
        """Return the source rank of each row in order of arrival, own rows last: int64 [total]."""
        order = [rank for rank in range(len(self.received)) if rank != self.rank] + [self.rank]
        counts = torch.tensor([self.received[rank] for rank in order], device=device)
        return torch.tensor(order, device=device).repeat_interleave(counts, output_size=self.total_received)


class Order(NamedTuple):
    """An order of the receive buffer, int64: the slots of rows from peers and of own rows, and the row of each slot."""

    slots: Tensor
    own_slots: Tensor
    rows: Tensor


class Arrivals:
    """Successive orders of rows in the receive buffer: by source, or seeded and random."""

    def __init__(self, traffic: RowCounts, device: torch.device, *, seed: int, shuffled: bool, kinds: int = 1) -> None:
        """`kinds` of inputs are dispatched, one after the other."""
        self._drawn = (_DRAWN_ON_CPU * kinds if device.type == "cpu" else _DRAWN_ON_DEVICE) if shuffled else 1
        self._traffic = traffic
        self._device = device
        self._seed = seed
        self._shuffled = shuffled
        self._calls = 0
        self._orders: list[Order] = []

    def next(self) -> Order:
        """Return the next order."""
        index = self._calls % self._drawn
        if not self._orders or (index == 0 and self._shuffled and self._device.type == "cpu"):
            self._orders = self._draw(self._drawn)
        self._calls += 1
        return self._orders[index]

    def _draw(self, count: int) -> list[Order]:
        traffic = self._traffic
        natural = torch.arange(traffic.total_received, device=self._device).unsqueeze(0)
        by_source = natural
        if self._shuffled:
            names = [f"slots/{call}" for call in range(self._calls, self._calls + count)]
            by_source = shuffles(self._seed, names, self._traffic.rank, traffic.total_received, self._device)
        start, stop = traffic.before_own, traffic.before_own + traffic.own
        slots = torch.cat([by_source[:, :start], by_source[:, stop:], by_source[:, start:stop]], dim=1)
        rows = torch.empty_like(slots).scatter_(1, slots, natural.expand_as(slots))
        parts = *slots.split([traffic.arriving, traffic.own], dim=1), rows
        return [Order(*order) for order in zip(*(part.unbind(0) for part in parts), strict=True)]
