"""Expected results of combine, against the rules of docs/mori.md applied token by token."""

from __future__ import annotations

from functools import reduce

import pytest
import torch
from torch import Tensor

from distbench.transport.mori.config import sum_order
from distbench.transport.sum_order import SumOrder
from distbench.verify.combine_model import added, same_bits_or_nan, slots_of
from distbench.workload.routing import destinations
from distbench.workload.routing_spec import ExpertGroup

GROUP = ExpertGroup(ep_size=4, num_experts=16, topk=6)
ORDERS = {
    "all_to_all": SumOrder(),
    "IntraNode": SumOrder(),
    "IntraNodeLL": SumOrder(last_slot=True),
    "InterNodeV1": SumOrder(node_ranks=2),
    "AsyncLL": SumOrder(),
}
BY_RANK = SumOrder(by_rank=True)


def told_by_the_words(ids: list[int], rows: dict[int, Tensor], order: SumOrder) -> Tensor:
    """Add one token's rows, by the rank that returned each."""
    owners = [expert // GROUP.experts_per_rank if 0 <= expert < GROUP.num_experts else None for expert in ids]
    slots = list(reversed(owners)) if order.last_slot else owners
    ranks = [rank for rank in dict.fromkeys(slots) if rank is not None]
    ranks = list(reversed(ranks)) if order.last_slot else ranks
    ranks = sorted(ranks) if order.by_rank else ranks

    def total(some: list[int]) -> Tensor:
        return reduce(lambda so_far, rank: so_far + rows[rank].float(), some, torch.zeros(8)).bfloat16()

    if not order.node_ranks:
        return total(ranks)
    nodes = sorted({rank // order.node_ranks for rank in ranks})
    parts = [total([rank for rank in ranks if rank // order.node_ranks == node]) for node in nodes]
    return reduce(lambda so_far, part: so_far + part.float(), parts, torch.zeros(8)).bfloat16()


def test_order_of_moris_kernels_is_declared() -> None:
    assert {kernel: sum_order(kernel, 2, "none") for kernel in ORDERS} == ORDERS


@pytest.mark.parametrize("order", [*ORDERS.values(), BY_RANK])
def test_sums_follow_the_order_that_the_transport_declares(order: SumOrder) -> None:
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(-1, 17, (64, 6), generator=generator, dtype=torch.int32)
    ids[0] = -1
    going = destinations(ids, GROUP.experts_per_rank, GROUP.ep_size)
    rank_of, token_of = going.t().nonzero().unbind(1)
    scale = 10.0 ** torch.randint(-3, 4, (len(rank_of), 1), generator=generator)
    rows = (torch.randn(len(rank_of), 8, generator=generator) * scale).bfloat16()
    found = added(slots_of(ids, GROUP, order).arranged(rows), order)
    for token, row in enumerate(ids.tolist()):
        mine = {int(rank): rows[place] for place, rank in enumerate(rank_of) if int(token_of[place]) == token}
        assert torch.equal(found[token], told_by_the_words(row, mine, order))


def test_sum_of_no_tokens_is_empty() -> None:
    nothing = slots_of(torch.empty(0, 6, dtype=torch.int32), GROUP, SumOrder()).arranged(torch.empty(0, 8))
    assert added(nothing, SumOrder()).shape == (0, 8)


def test_fp8_combine_is_declared_as_quantised() -> None:
    assert sum_order("IntraNode", 8, "fp8_blockwise").quantised


def test_any_two_nans_are_equal_and_signed_zeros_differ() -> None:
    nan, other = torch.tensor([[0x7FC0]], dtype=torch.int16), torch.tensor([[-0x40]], dtype=torch.int16)
    assert same_bits_or_nan(nan.view(torch.bfloat16), other.view(torch.bfloat16)).tolist() == [True]
    assert same_bits_or_nan(torch.tensor([[0.0]]), torch.tensor([[-0.0]])).tolist() == [False]
    assert same_bits_or_nan(torch.tensor([[1.0]]), torch.tensor([[float("nan")]])).tolist() == [False]
