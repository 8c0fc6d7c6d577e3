"""A combine of one's own, and its test: `pytest test_combine.py` fails, and says where the combine is wrong."""

import pytest
import torch.distributed as dist

from distbench.plugins import TransportAround, collective_transport


class OwnCombine(TransportAround):
    """distbench's dispatch, and a combine that gathers the rows of all ranks."""

    def __init__(self, context):
        super().__init__(collective_transport(context))
        self.context = context

    def combine_send(self, expert_out, ids):
        self.returned = self.sources().tolist(), expert_out.clone()
        super().combine_send(expert_out, ids)

    def combine_recv(self):
        tokens = super().combine_recv()
        everyone = [None] * self.context.case.ep_size
        dist.all_gather_object(everyone, self.returned, group=self.context.group)
        for sources, rows in everyone:
            for (rank, token), row in zip(sources, rows, strict=False):
                if rank == self.context.rank:
                    tokens[token] = row  # a bug: rows of several ranks have to be added
        return tokens


@pytest.mark.distbench(ranks=2, model="tiny", tokens=[3, 5], transport=OwnCombine, device="cpu")
def test_own_combine_returns_the_right_bits(): ...
