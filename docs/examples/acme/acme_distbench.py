"""A transport as an installed plugin: `pip install .`, then `distbench conform --transport acme`."""

from typing import Annotated

import msgspec
import torch
import torch.distributed as dist

from distbench.plugins import Dispatched, Plugin, WholeTransport, poison_


class Options(msgspec.Struct, frozen=True):
    """`--transport-option chunk=64`: rows that are sent at a time."""

    chunk: Annotated[int, msgspec.Meta(ge=1, le=65_536)] = 1024


class AcmeTransport(WholeTransport):
    """Dispatch and combine by all-gather."""

    def __init__(self, context):
        self.context, self.capacity = context, context.case.capacity
        self.facts = {"chunk": context.options.chunk}
        like = context.like
        self.received = Dispatched(
            hidden=like.hidden.new_empty(self.capacity, like.hidden.shape[1]),
            scales=None if like.scales is None else like.scales.new_empty(self.capacity, like.scales.shape[1]),
            weights=like.weights.new_empty(self.capacity, like.weights.shape[1]),
            ids=like.ids.new_empty(self.capacity, like.ids.shape[1]),
            total_recv=like.ids.new_zeros(1),
        )

    def gathered(self, mine):
        everyone = [None] * self.context.case.ep_size
        dist.all_gather_object(everyone, mine, group=self.context.group)
        return everyone

    def dispatch(self, batch):
        everyone = self.gathered(tuple(batch))
        per_rank = self.context.case.experts_per_rank
        kept = [(sent[3].div(per_rank, rounding_mode="floor") == self.context.rank).any(1) for sent in everyone]
        self.came_from = torch.cat(
            [
                torch.stack([torch.full_like(rows, rank), rows], dim=1)
                for rank, mine in enumerate(kept)
                for rows in [mine.nonzero()[:, 0]]
            ]
        )
        total = len(self.came_from)
        for field, buffer in enumerate(self.received[:4]):
            if buffer is not None:
                poison_(buffer)  # a row that does not arrive must not pass as the row of the call before
                buffer[:total] = torch.cat([sent[field][mine] for sent, mine in zip(everyone, kept, strict=True)])
        self.received.total_recv.fill_(total)
        return self.received

    def combine(self, expert_out, ids):
        tokens = torch.zeros(len(ids), expert_out.shape[1])
        returned = expert_out.new_full((len(self.came_from), expert_out.shape[1]), torch.nan)  # what a cut has lost
        returned[: len(expert_out)] = expert_out[: len(returned)]
        for sources, rows in self.gathered((self.came_from, returned)):
            for (rank, token), row in zip(sources.tolist(), rows, strict=True):
                if rank == self.context.rank:
                    tokens[token] += row.float()
        return tokens.to(expert_out.dtype)

    def sources(self):
        return self.came_from


PLUGIN = Plugin(make=AcmeTransport, name="acme", version="0.1", devices=("cpu",), dtypes=("bf16",), options=Options)
