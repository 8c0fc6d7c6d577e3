"""Tokens one place further on their way through a transport, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from distbench.pipeline.inputs import workload_for
from distbench.pipeline.turned import TurnedTransport
from distbench.plugins import Dispatched, TokenBatch, WholeTransport
from tests.cases import tiny_case

TOKENS = (3, 1, 0)
CPU = torch.device("cpu")


class Kept(WholeTransport):
    """A transport that keeps what it is given, and returns the rows as they are."""

    capacity = 8

    def __init__(self, told: Tensor) -> None:
        self.told = told
        self.batches: list[TokenBatch] = []
        self.ids: list[Tensor] = []

    def dispatch(self, batch: TokenBatch) -> Dispatched:
        self.batches.append(batch)
        return Dispatched(*batch, torch.tensor([len(batch.ids)], dtype=torch.int32))

    def combine(self, expert_out: Tensor, ids: Tensor) -> Tensor:
        self.ids.append(ids)
        return expert_out

    def sources(self) -> Tensor:
        return self.told


def test_each_token_is_sent_one_place_further_and_comes_back_to_its_own() -> None:
    batch = workload_for(tiny_case(1, tokens=TOKENS[0], dispatch_dtype="fp8"), CPU).tokens(0)
    inner = Kept(torch.empty(0, 2, dtype=torch.int64))
    around = TurnedTransport(inner, TOKENS, CPU)
    around.dispatch_send(batch)
    around.dispatch_recv()
    around.combine_send(batch.hidden.float().roll(1, 0), batch.ids)
    assert torch.equal(around.combine_recv(), batch.hidden.float())
    found = around.dispatch(batch)
    for sent in inner.batches:
        for mine, given in zip(sent, batch, strict=True):
            assert mine is not None
            assert given is not None
            assert torch.equal(mine.view(torch.uint8), given.view(torch.uint8).roll(1, 0))
    assert torch.equal(around.combine(found.hidden.float(), batch.ids), batch.hidden.float())
    assert all(torch.equal(ids, batch.ids.roll(1, 0)) for ids in inner.ids)


def test_sources_name_the_tokens_that_were_given_and_leave_others_as_they_are() -> None:
    told = torch.tensor([[0, 0], [0, 1], [0, 2], [1, 0], [0, 3], [2, 0], [3, 1], [-1, 0], [0, -1]])
    found = TurnedTransport(Kept(told), TOKENS, CPU).sources()
    right = [[0, 2], [0, 0], [0, 1], [1, 0], [0, 3], [2, 0], [3, 1], [-1, 0], [0, -1]]
    assert found.tolist() == right
