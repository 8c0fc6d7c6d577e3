"""Faults that only two-batch overlap can have: one sub-batch under way while the other is touched.

The stand-ins complete a move in its receive half, so each fault shows here what a device would read or send too early.
"""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.case.stages import Stage
from distbench.faults.base import Fault
from distbench.transport.base import Dispatched, poison_
from distbench.workload.batch import TokenBatch
from distbench.workload.routing import destinations

_OVERLAPPED = {"two_batch_overlap": True}


class ReceiveForgotten(Fault):
    """The experts read the receive buffer before the receive half has filled it."""

    name, stage = "receive-forgotten", Stage.DISPATCH
    bug = "SGLang's dispatch_b without dispatch_recv, or without the wait for the communication stream"
    shape = _OVERLAPPED
    needs = "rows received on its rank"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Return the buffer as it was before: rows of earlier calls, which are poisoned here."""
        live = int(dispatched.total_recv)
        self.hits += live
        for part in dispatched.fields():
            poison_(part[:live])
        return dispatched


class CombineReceiveForgotten(Fault):
    """The tokens are read before combine's receive half has added them."""

    name, stage = "combine-receive-forgotten", Stage.COMBINE
    bug = "SGLang's combine_b without combine_recv, or without the wait for the communication stream"
    shape = _OVERLAPPED
    needs = "tokens on its rank"

    def combined(self, tokens: Tensor) -> Tensor:
        """Return the output as it is before anything was added."""
        self.hits += len(tokens)
        return tokens.zero_()


class StreamWaitMissing(Fault):
    """Combine sends the experts' rows back before the compute stream has written all of them."""

    name, stage = "stream-wait-missing", Stage.COMBINE
    bug = "the communication stream of two-batch overlap without wait_event on the compute stream's event"
    shape = _OVERLAPPED

    def returned(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Send the second half of the rows as the memory was before."""
        live = min(len(self.scene.sources()), len(rows))
        self.hits += live - live // 2
        early = rows.clone()
        early[live // 2 : live] = float("nan")
        return early, ids


class SendBufferReused(Fault):
    """The other sub-batch's rows are staged over this one's before they have left."""

    name, stage = "send-buffer-reused", Stage.DISPATCH
    bug = "mori 80, 93's class: one staging buffer for two sends in flight"
    shape = _OVERLAPPED | {"tokens": 12}
    needs = "tokens of both sub-batches on its rank"

    def sent(self, batch: TokenBatch) -> TokenBatch:
        """Send the other's payload in place of the first tokens' own."""
        other = self.scene.other
        if other is None:
            return batch
        count = min(len(batch.hidden), len(other.hidden))
        hidden = batch.hidden.clone()
        hidden[:count] = other.hidden[:count]
        self.hits += count
        return batch._replace(hidden=hidden)


class IdsOfTheOther(Fault):
    """Combine of one sub-batch is given the ids of the other."""

    name, stage = "ids-of-the-other-sub-batch", Stage.COMBINE
    bug = "mori 475's class: state kept on the dispatcher, which the other sub-batch has overwritten"
    shape = _OVERLAPPED | {"tokens": 12}
    needs = "tokens of both sub-batches that go to different ranks: three ranks or more"

    def returned(self, rows: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return the other's ids, one for each token."""
        other = self.scene.other
        if other is None or not len(other.ids):
            return rows, ids
        wrong = other.ids[torch.arange(len(ids), device=ids.device) % len(other.ids)]
        case = self.scene.case
        asked, sent = (destinations(one, case.experts_per_rank, case.ep_size) for one in (wrong, ids))
        self.hits += int((asked != sent).any(1).sum())
        return rows, wrong
