"""Rows on their way between ranks: by one all-to-all, or only between those ranks that have rows for each other."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch.distributed as dist
from torch import Tensor

from distbench.transport.arrival import Geometry

Travel = tuple[dist.Work, ...]
"""What is under way, to be waited for."""

_FEW = 0.5


def few_pairs(geometry: Geometry) -> bool:
    """Whether less than half of all pairs of ranks have rows for each other, which all ranks see alike."""
    pairs = geometry.ep_size * (geometry.ep_size - 1)
    busy = int((geometry.counts > 0).sum()) - int((geometry.counts.diagonal() > 0).sum())
    return busy < _FEW * pairs


def send_to_some(
    group: dist.ProcessGroup, incoming: Tensor, outgoing: Tensor, received: Sequence[int], sent: Sequence[int]
) -> Travel:
    """Start the travel of as many rows of `outgoing` to each rank as `sent` says, with no message where it is none.

    gloo's all-to-all has a message for every rank, an empty one too, so that W ranks send W (W - 1) of them.
    """
    receipts = [dist.irecv(rows, group=group, group_src=peer) for peer, rows in _parts(incoming, received)]
    sendings = [dist.isend(rows, group=group, group_dst=peer) for peer, rows in _parts(outgoing, sent)]
    return tuple(work for work in (*receipts, *sendings) if work is not None)


def _parts(rows: Tensor, counts: Sequence[int]) -> Iterator[tuple[int, Tensor]]:
    start = 0
    for peer, count in enumerate(counts):
        if count:
            yield peer, rows[start : start + count]
        start += count
