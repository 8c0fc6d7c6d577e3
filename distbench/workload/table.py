"""Tokens of a small case in one table, from which any rank's tokens are copied: a draw costs the same for all of them.

A rank needs its own tokens, those that it receives and those that it measures. Drawn one by one, these take about 30
small operations a stream each time.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from distbench.workload.routing_spec import Routing, Slots
from distbench.workload.slots import route_to_slots

# Memory of a table: on a CPU within its caches, on a device 128 MiB of bf16.
_ON_CPU, _ON_DEVICE = 1 << 18, 1 << 26


class Span(NamedTuple):
    """Ranks, and tokens of each, that a table holds: token t of rank r is its row r * tokens + t."""

    ranks: int
    tokens: int

    def everyone(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the ranks and tokens of all rows of the table, int64; they must not be written to."""
        return _everyone(self, device)

    def places(self, ranks: Tensor, tokens: Tensor) -> Tensor | None:
        """Return the rows of some ranks' tokens, int64 [m] each; None without tokens, or where the table lacks one."""
        if not ranks.numel():
            return None
        (first_rank, first), (last_rank, last) = (one.tolist() for one in torch.stack([ranks, tokens]).aminmax(dim=1))
        if min(first_rank, first) < 0 or last_rank >= self.ranks or last >= self.tokens:
            return None
        return ranks * self.tokens + tokens


@lru_cache(maxsize=4)
def _everyone(span: Span, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = torch.arange(span.ranks * span.tokens, device=device)
    ranks = rows.div(span.tokens, rounding_mode="floor")
    return ranks, rows - ranks * span.tokens


def span_of(tokens_per_rank: tuple[int, ...], columns: int, device: torch.device) -> Span | None:
    """Return the span of a case whose rows have `columns` columns; None where a table would be large for `device`."""
    span = Span(len(tokens_per_rank), max(tokens_per_rank, default=0))
    most = _ON_CPU if device.type == "cpu" else _ON_DEVICE
    return span if span.ranks * span.tokens * columns <= most else None


@lru_cache(maxsize=1)
def routing_table(routing: Routing, slots: Slots, seed: int, span: Span, device: torch.device) -> Tensor:
    """Return the experts of all tokens of `span`, int32 [rows, k]; both kinds of inputs of a case share them."""
    ranks, tokens = span.everyone(device)
    return route_to_slots(routing, slots, seed=seed, ranks=ranks, tokens=tokens)
