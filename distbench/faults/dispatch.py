"""Faults of dispatch: the rows that a rank sends, and its receive buffer."""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.case.stages import Stage
from distbench.faults.base import Fault
from distbench.faults.options import one_of, whole
from distbench.transport.base import Dispatched, poison_
from distbench.workload.batch import TokenBatch
from distbench.workload.routing import destinations

BIT = whole(-1, -1, (1 << 20) - 1)
"""A bit index over the whole row, modulo its size; -1 for a random one."""


def _longer(rows: Tensor, more: int) -> Tensor:
    tail = rows.new_empty(more, rows.shape[1])
    poison_(tail)
    return torch.cat([rows.view(torch.uint8), tail.view(torch.uint8)]).view(rows.dtype)


def flip(rows: Tensor, row: int, bit: int) -> None:
    """Flip bit `bit` of one row of `rows` [n, columns], counted over the whole row, in place."""
    whole = rows.view(torch.uint8)
    whole[row, bit // 8 % whole.shape[1]] ^= 1 << bit % 8


class SentZeros(Fault):
    """A rank sends zeros instead of its tokens' payload."""

    name, stage = "sent-zeros", Stage.DISPATCH
    bug = "mori 617's class, on the sender: an unfilled send buffer goes out to every rank"
    needs = "tokens on its rank"

    def sent(self, batch: TokenBatch) -> TokenBatch:
        """Zero a copy of the payload."""
        self.hits += len(batch.hidden)
        return batch._replace(hidden=torch.zeros_like(batch.hidden))


class SentFlip(Fault):
    """One bit of one token's payload is wrong before it is sent, so all ranks that receive it have it wrong."""

    name, stage = "sent-flip", Stage.DISPATCH
    bug = "mori 475, 610: single tokens are corrupted, and the receiving ranks are blamed"
    options = {"bit": BIT}
    needs = "a token of its rank that goes to two ranks"

    def sent(self, batch: TokenBatch) -> TokenBatch:
        """Flip bit `bit` of a token that goes to several ranks, a random one if negative."""
        case = self.scene.case
        shared = (destinations(batch.ids, case.experts_per_rank, case.ep_size).sum(1) > 1).nonzero().flatten()
        if not shared.numel():
            return batch
        hidden, bit = batch.hidden.clone(), self.chosen["bit"]
        bits = hidden.shape[1] * hidden.element_size() * 8
        flip(hidden, int(shared[self.pick(shared.numel())]), bit if bit >= 0 else int(self.random(1) * bits))
        return batch._replace(hidden=hidden)


class FlippedBit(Fault):
    """One bit of one received row is wrong, in the payload, the scales, the weights or the ids."""

    name, stage = "flipped-bit", Stage.DISPATCH
    bug = "mori 610: residual corruption of single tokens"
    options = {"field": one_of("hidden", "scales", "weights", "ids"), "bit": BIT}
    needs = "rows received on its rank; field=scales needs dispatch_dtype fp8"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Flip bit `bit` of a row, a random one if negative."""
        rows = getattr(dispatched, self.chosen["field"], None)
        live = int(dispatched.total_recv)
        if live and rows is not None:
            bits = rows.shape[1] * rows.element_size() * 8
            bit = self.chosen["bit"]
            flip(rows, self.pick(live), bit if bit >= 0 else int(self.random(1) * bits))
        return dispatched


class Overwritten(Fault):
    """A fast peer writes its next message into the receive buffer before this rank has read it."""

    name, stage = "overwritten-by-peer", Stage.DISPATCH
    bug = "mori 80, 484: a rank that is a call ahead overwrites rows that a slow one has not read"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Write another row's payload over a quarter of the rows."""
        live = int(dispatched.total_recv)
        if live > 1:
            count = max(live // 4, 1)
            self.hits += count
            dispatched.hidden[:count] = dispatched.hidden[live - count : live].clone()
        return dispatched


class MetadataDropped(Fault):
    """The payload arrives, ids and weights do not."""

    name, stage = "ids-and-weights-dropped", Stage.DISPATCH
    bug = "mori 617: a staging pool too small drops ids and weights while the payload is right"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Zero the weights of every other row, and remove its ids."""
        live = int(dispatched.total_recv)
        self.hits += (live + 1) // 2
        dispatched.ids[:live:2] = -1
        dispatched.weights[:live:2] = 0
        return dispatched


class ForeignIds(Fault):
    """Some ids are -1, others past the last expert."""

    name, stage = "ids-out-of-range", Stage.DISPATCH
    bug = "mori 363, aiter 4530, vllm 57036: -1 and huge ids fault in routing and sorting"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Put -1, E and a huge number in the first slots of three rows."""
        live = int(dispatched.total_recv)
        for row, wrong in zip(range(live), (-1, self.scene.case.placed_experts, 1 << 30), strict=False):
            self.hits += 1
            dispatched.ids[row, 0] = wrong
        return dispatched


class SlotsLost(Fault):
    """Slots past the first few arrive as if no expert had been chosen there."""

    name, stage = "slots-lost", Stage.DISPATCH
    bug = "mori IntraNodeLL: top-k slots past 8 are lost"
    options = {"first": whole(8, 0, 1024)}
    shape = {"topk": 10}
    needs = "a topk above `first`"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Remove ids and weights of slot `first` and all later ones."""
        live, first = int(dispatched.total_recv), self.chosen["first"]
        self.hits += live if first < dispatched.ids.shape[1] else 0
        dispatched.ids[:live, first:] = -1
        dispatched.weights[:live, first:] = 0
        return dispatched


class Unreceived(Fault):
    """Rows beyond the capacity of the buffer are silently lost."""

    name, stage = "capacity-not-checked", Stage.DISPATCH
    bug = "mori IntraNode: the receive capacity is not checked, rows past it land on others"
    needs = "three rows received on its rank"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Wrap the last third of the rows round to the start of the buffer."""
        live = int(dispatched.total_recv)
        lost = live // 3
        self.hits += lost
        for part in dispatched.fields():
            part[:lost] = part[live - lost : live].clone()
            poison_(part[live - lost : live])
        return dispatched


class CapacityIgnored(Fault):
    """The requested capacity is not applied: the receive buffer has room for all rows that could be sent."""

    name, stage = "capacity-ignored", Stage.DISPATCH
    bug = "sglang's moriep.py: max_total_recv_tokens is dropped with a warning where the installed MoRI lacks it"
    shape = {
        "prealloc_max_recv_tokens": 96,
        "tokens": 12,
        "max_dispatch_tokens_per_rank": 64,
        "combine_input": "registered",  # MoRI's own buffer: any other buffer would be too small for the cap
    }
    needs = "a prealloc_max_recv_tokens that makes the buffer smaller"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Append rows to the buffer, up to W * M."""
        case = self.scene.case
        missing = case.ep_size * case.max_dispatch_tokens_per_rank - len(dispatched.hidden)
        self.hits += missing
        return Dispatched(
            hidden=_longer(dispatched.hidden, missing),
            scales=None if dispatched.scales is None else _longer(dispatched.scales, missing),
            weights=_longer(dispatched.weights, missing),
            ids=_longer(dispatched.ids, missing),
            total_recv=dispatched.total_recv,
        )


class ShareOverflow(Fault):
    """Every peer has an equal share of the buffer; rows of the busiest beyond its share are dropped."""

    name, stage = "share-overflow", Stage.DISPATCH
    bug = "mori 245, 59: the share of a peer overflows under skew"
    needs = "a source that sends more than the average"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Poison the rows of the busiest source beyond the average."""
        owners = self.scene.sources()[:, 0]
        counts = torch.bincount(owners, minlength=self.scene.case.ep_size)
        share = owners.numel() // self.scene.case.ep_size
        late = (owners == int(counts.argmax())).nonzero().flatten()[share:]
        self.hits += late.numel()
        dispatched.hidden[late] = float("nan")
        return dispatched


class TotalShort(Fault):
    """total_recv is one row short."""

    name, stage = "total-recv-short", Stage.DISPATCH
    bug = "mori 165: total_recv read at the wrong time is not the number received"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Subtract one."""
        self.hits += int(dispatched.total_recv) > 0
        return dispatched._replace(total_recv=(dispatched.total_recv - 1).clamp(min=0))


class SwappedRows(Fault):
    """Two rows have each other's payload: sums and norms over the buffer stay the same."""

    name, stage = "swapped-rows", Stage.DISPATCH
    bug = "mori 475's class: right numbers in the wrong rows, which checksums and norms do not see"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Exchange the payloads of two rows."""
        live = int(dispatched.total_recv)
        if live > 1:
            first = self.pick(live)
            second = (first + 1) % live
            dispatched.hidden[[first, second]] = dispatched.hidden[[second, first]].clone()
        return dispatched


class SwappedWeights(Fault):
    """Two rows have each other's routing weights, scaled by their neighbours."""

    name, stage = "weights-of-another-token", Stage.DISPATCH
    bug = "mori 201: the receiving half used another call's arguments"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Give every row the weights of the row before it."""
        live = int(dispatched.total_recv)
        before = dispatched.weights[:live].clone()
        dispatched.weights[:live] = before.roll(1, 0)
        self.hits += int((before != dispatched.weights[:live]).any(1).sum())
        return dispatched


class CrossNode(Fault):
    """Only tokens that came from another node are wrong."""

    name, stage = "cross-node", Stage.DISPATCH
    bug = "mori 475, 546, 610: tokens are wrong across nodes only, one node stays clean"
    options = {"node": whole(2, 1, 1024)}
    needs = "more ranks than `node`, and rows that come from them"

    def received(self, dispatched: Dispatched) -> Dispatched:
        """Flip a bit of every row whose source is not among this rank's node of `node` ranks."""
        node = self.chosen["node"]
        far = (self.scene.sources()[:, 0] // node != self.scene.rank // node).nonzero().flatten()
        self.hits += far.numel()
        dispatched.hidden.view(torch.uint8)[far, 1] ^= 0x40
        return dispatched
