"""Tokens one place further: what a part has kept of an earlier call belongs to another token then."""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.pipeline.parts import Parts
from distbench.transport.base import Dispatched, Transport, TransportAround
from distbench.workload.batch import TokenBatch


class TurnedTransport(TransportAround):
    """A transport whose ranks send their tokens one place further, the last one first; its callers see no difference.

    As many rows go from rank to rank.
    """

    def __init__(self, inner: Transport, tokens: tuple[int, ...], device: torch.device) -> None:
        """`tokens` are those of each rank."""
        super().__init__(inner)
        self._tokens = torch.tensor(tokens, device=device)

    def dispatch(self, batch: TokenBatch) -> Dispatched:
        """See `Transport.dispatch`."""
        return self._inner.dispatch(_further(batch))

    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        """See `Transport.combine`."""
        return _moved(self._inner.combine(expert_out, _moved(ids, 1)), -1)

    def dispatch_send(self, batch: TokenBatch) -> None:
        """See `Transport.dispatch_send`."""
        super().dispatch_send(_further(batch))

    def combine_send(self, expert_out: Tensor, ids: Tensor) -> None:
        """See `Transport.combine_send`."""
        super().combine_send(expert_out, _moved(ids, 1))

    def combine_recv(self) -> Tensor:
        """See `Transport.combine_recv`."""
        return _moved(super().combine_recv(), -1)

    def sources(self) -> Tensor:
        """See `Transport.sources`; a token that its rank does not have stays as it is."""
        ranks, tokens = super().sources().unbind(1)
        known = (ranks >= 0) & (ranks < len(self._tokens))
        most = self._tokens[torch.where(known, ranks, 0)]
        known &= (tokens >= 0) & (tokens < most)
        return torch.stack([ranks, torch.where(known, (tokens - 1).remainder(most.clamp(min=1)), tokens)], dim=1)


def turned(parts: Parts, case: Case) -> Parts:
    """Return the parts with tokens one place further on their way through the transport, in each sub-batch."""
    device = parts.batch.ids.device
    return parts._replace(
        transport=TurnedTransport(parts.transport, case.tokens, device),
        sub_batches=tuple(
            one._replace(transport=TurnedTransport(one.transport, case.sub_batch_tokens[one.place], device))
            for one in parts.sub_batches
        ),
    )


def _further(batch: TokenBatch) -> TokenBatch:
    hidden, scales, weights, ids = batch
    scales = None if scales is None else _moved(scales, 1)
    return TokenBatch(_moved(hidden, 1), scales, _moved(weights, 1), _moved(ids, 1))


def _moved(rows: Tensor, places: int) -> Tensor:
    """Return rows [n, .], each `places` further."""
    if rows.element_size() > 1:
        return rows.roll(places, 0)
    return rows.view(torch.uint8).roll(places, 0).view(rows.dtype)  # not every device rolls float8
