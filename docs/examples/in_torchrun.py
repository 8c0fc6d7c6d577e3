"""Functions of one's own inside a torchrun job: `torchrun --nproc-per-node 2 in_torchrun.py`."""

import torch
import torch.distributed as dist

from distbench import api
from distbench.plugins import Dispatched

CASE = api.Case(model="tiny", tokens=[3, 5], device="cpu")


class AllGather:
    """Dispatch and combine by all-gather: every rank takes all rows, and keeps its own."""

    def __init__(self, num_experts):
        self.rank, self.ranks = dist.get_rank(), dist.get_world_size()
        self.per_rank = num_experts // self.ranks

    def gathered(self, mine):
        everyone = [None] * self.ranks
        dist.all_gather_object(everyone, mine)
        return everyone

    def dispatch(self, batch):
        everyone = self.gathered(tuple(batch))
        ids = torch.cat([sent[3] for sent in everyone])
        mine = (ids // self.per_rank == self.rank).any(1)
        hidden, weights = (torch.cat([sent[field] for sent in everyone])[mine] for field in (0, 2))
        self.sources = torch.cat([torch.full((len(sent[3]),), rank) for rank, sent in enumerate(everyone)])[mine]
        self.tokens = torch.cat([torch.arange(len(sent[3])) for sent in everyone])[mine]
        return Dispatched(hidden, None, weights, ids[mine], mine.sum().int().view(1))

    def combine(self, rows, ids):
        tokens = torch.zeros(len(ids), rows.shape[1])
        for sources, places, returned in self.gathered((self.sources, self.tokens, rows)):
            own = sources[: len(returned)] == self.rank
            tokens.index_add_(0, places[: len(returned)][own], returned[: len(sources)][own].float())
        return tokens.to(rows.dtype)


def main():
    own = AllGather(num_experts=8)  # the tiny layer has four on each rank
    report = api.run_in_group(None, CASE, dispatch=own.dispatch, combine=own.combine)
    if dist.get_rank() == 0:
        print(report)
    return report


if __name__ == "__main__":
    dist.init_process_group("gloo")
    main()
    dist.destroy_process_group()
