"""Sources of received rows, found by content: for transports that cannot say where a row came from."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from distbench.transport.base import Dispatched, TransportContext
from distbench.workload.batch import TokenBatch
from distbench.workload.routing import destinations

_DIGEST_BYTES = 8
_LOST = (0, -1)

Source = tuple[int, int]
"""Source rank and token."""


def match_sources(context: TransportContext, batch: TokenBatch, received: Dispatched, total: int) -> Tensor:
    """Source rank and token of each of `total` received rows, int64 [total, 2]. Collective; waits for a device.

    `batch` is what this rank sent. A received row is the one that was sent with the same bits; else one with its ids
    and weights; else any that no row matches, so that a wrong row is compared with a missing one. A row beyond those
    that were sent is token -1 of rank 0.
    """
    sent = _sent_here(context, batch)
    found: list[Source | None] = [None] * total
    for level, digests in enumerate(_digests([part[:total] for part in received[:4] if part is not None])):
        taken = set(found)
        free: dict[int, list[Source]] = defaultdict(list)
        for source in reversed([one for one in sent if one not in taken]):
            free[sent[source][level]].append(source)
        for place, digest in enumerate(digests):
            if found[place] is None and free[digest]:
                found[place] = free[digest].pop()
    taken = set(found)
    missing = (one for one in sent if one not in taken)
    sources = [next(missing, _LOST) if one is None else one for one in found]
    return torch.tensor(sources, dtype=torch.int64, device=received.ids.device).view(total, 2)


def _sent_here(context: TransportContext, batch: TokenBatch) -> dict[Source, tuple[int, int]]:
    """Digests of the rows that are sent to this rank, whole and of their routing, by source. Collective."""
    case, session = context.case, context.session
    digests = torch.tensor(_digests([part for part in batch if part is not None]), dtype=torch.int64).view(2, -1)
    rows = torch.cat([digests.T, batch.ids.cpu().long()], dim=1)
    padded = rows.new_zeros(max(case.tokens), rows.shape[1])
    padded[: len(rows)] = rows
    found: dict[Source, tuple[int, int]] = {}
    for rank, table in enumerate(session.everyones(padded.flatten()).view(case.ep_size, *padded.shape)):
        own = table[: case.tokens[rank]]
        here = destinations(own[:, 2:], case.experts_per_rank, case.ep_size)[:, context.rank]
        for token in here.nonzero()[:, 0].tolist():
            whole, routing = own[token, :2].tolist()
            found[rank, token] = whole, routing
    return found


def _digests(parts: Sequence[Tensor]) -> tuple[list[int], list[int]]:
    """Digests of rows, of all their fields and of the last two, weights and ids."""
    host = [part.detach().cpu().contiguous().view(torch.uint8) for part in parts]
    return _of_rows(torch.cat(host, dim=1)), _of_rows(torch.cat(host[-2:], dim=1))


def _of_rows(rows: Tensor) -> list[int]:
    made = (hashlib.blake2b(row.tobytes(), digest_size=_DIGEST_BYTES) for row in rows.numpy())
    return [int.from_bytes(one.digest(), "little", signed=True) for one in made]
