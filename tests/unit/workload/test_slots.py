"""Shared and replicated experts and ids of -1, against a dense layer by logical experts that shares no code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from distbench.experts.base import ExpertWeights
from distbench.experts.roundings import Roundings
from distbench.verify.ideal import ideal_rows
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload, make_workload
from distbench.workload.routing import are_local, recv_counts
from distbench.workload.routing_spec import ExpertGroup, Slots
from tests.unit.workload.shapes import same_bits

HIDDEN, INTER = 64, 32
TOKENS = 9


def workload_of(**changes: Any) -> Workload:
    keys: dict[str, Any] = {
        "numerics": "exact",
        "hidden_size": HIDDEN,
        "intermediate_size": INTER,
        "num_experts": 8,
        "topk": 3,
        "ep_size": 4,
        "seed": 5,
        "routing": "uniform",
        "dispatch_dtype": "bf16",
        "device": "cpu",
    } | changes
    return make_workload(tokens_per_rank=(TOKENS,) * keys["ep_size"], **keys)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Keys of a layer at EP 1 to 8: shared experts, a table of uneven replicas or none, and dropped slots."""
    ep_size, experts = draw(st.integers(1, 8)), draw(st.integers(1, 10))
    least = -(-experts // ep_size)
    slots = ep_size * draw(st.integers(least, least + 3))
    more = draw(st.lists(st.integers(0, experts - 1), min_size=slots - experts, max_size=slots - experts))
    table = tuple(draw(st.permutations([*range(experts), *more])))
    return {
        "ep_size": ep_size,
        "num_experts": experts,
        "placement": table,
        "topk": draw(st.integers(1, min(experts, 4))),
        "shared_experts": draw(st.integers(0, 2)),
        "replica_choice": draw(st.sampled_from(["dynamic", "static"])),
        "dropped_slots": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "dropped_tokens": draw(st.sampled_from([0.0, 0.3, 1.0])),
        "routing": draw(st.sampled_from(["uniform", "zipf:1.2", f"hot-rank:{ep_size - 1}"])),
        "seed": draw(st.integers(0, 1 << 40)),
    }


def expert_of(keys: dict[str, Any], physical: int) -> int:
    """Logical expert of an id, by the layout of a rank: its slots of the table, then the shared experts."""
    routed = len(keys["placement"]) // keys["ep_size"]
    rank, slot = divmod(physical, routed + keys["shared_experts"])
    return int(keys["placement"][rank * routed + slot]) if slot < routed else keys["num_experts"] + slot - routed


def weights_of(workload: Workload, keys: dict[str, Any]) -> dict[int, tuple[Tensor, Tensor]]:
    """Weights in float64 of each logical expert, from the ranks that hold it, whose copies have equal bits."""
    found: dict[int, tuple[Tensor, Tensor]] = {}
    for rank in range(keys["ep_size"]):
        w1, w2 = workload.local_weights(rank)
        for slot in range(len(w1)):
            logical = expert_of(keys, rank * len(w1) + slot)
            mine = w1[slot].double(), w2[slot].double()
            for one, known in zip(mine, found.setdefault(logical, mine), strict=True):
                assert torch.equal(one, known)
    return found


def dense(workload: Workload, keys: dict[str, Any], batch: TokenBatch, *, stored: bool) -> Tensor:
    """Sum of each token's experts, float64 [n, H]; with `stored` the intermediate is rounded to bf16."""
    weights, total = weights_of(workload, keys), torch.zeros(len(batch.ids), HIDDEN, dtype=torch.float64)
    for token, (row, shares, ids) in enumerate(zip(batch.hidden.double(), batch.weights, batch.ids, strict=True)):
        logical = [expert_of(keys, physical) for physical in ids.tolist() if physical >= 0]
        assert len(set(logical)) == len(logical)
        for share, expert in zip(shares[ids >= 0].tolist(), logical, strict=True):
            gate, up = (weights[expert][0] @ row).chunk(2)
            middle = gate * torch.sigmoid(gate) * up
            total[token] += share * (weights[expert][1] @ (middle.bfloat16().double() if stored else middle))
    return total


@settings(max_examples=12, deadline=None)
@given(shapes())
def test_exact_oracle_is_the_dense_layer_and_the_sum_of_all_ranks_rows_bit_for_bit(keys: dict[str, Any]) -> None:
    workload = workload_of(**keys)
    for rank in range(keys["ep_size"]):
        batch = workload.tokens(rank)
        expected = workload.expected(batch)
        assert expected is not None
        assert same_bits(expected, dense(workload, keys, batch, stored=True).bfloat16() + 0.0)
        total = torch.zeros(TOKENS, HIDDEN)
        for other in range(keys["ep_size"]):
            rows = workload.expected_rows(other, batch)
            assert rows is not None
            total += rows.float()
        assert same_bits(expected, total.bfloat16())


@settings(max_examples=6, deadline=None)
@given(shapes())
def test_gaussian_oracle_is_the_dense_layer_where_ranks_rows_are_added(keys: dict[str, Any]) -> None:
    workload = workload_of(**keys, numerics="gaussian")
    for rank in range(keys["ep_size"]):
        batch, total = workload.tokens(rank), torch.zeros(TOKENS, HIDDEN, dtype=torch.float64)
        for other in range(keys["ep_size"]):
            mask = torch.zeros(workload.group.num_experts, dtype=torch.int32)
            mask[other * workload.experts_per_rank : (other + 1) * workload.experts_per_rank] = 1
            exact, _ = ideal_rows(batch, ExpertWeights(*workload.local_weights(other), mask), [Roundings()])
            total += exact.double()
        torch.testing.assert_close(total, dense(workload, keys, batch, stored=False), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("routing", ["uniform", "zipf:1.2"])
@pytest.mark.parametrize("choice", ["dynamic", "static"])
def test_result_is_the_same_whichever_replica_is_taken(routing: str, choice: str) -> None:
    table = (0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 3, 5, 1, 2, 0)
    plain, replicated = (
        workload_of(routing=routing),
        workload_of(routing=routing, placement=table, replica_choice=choice),
    )
    taken = set()
    for rank in range(4):
        one, other = plain.tokens(rank), replicated.tokens(rank)
        taken |= set(other.ids.flatten().tolist())
        assert torch.equal(torch.tensor(table)[other.ids.long()], one.ids.long())
        first, second = plain.expected(one), replicated.expected(other)
        assert first is not None
        assert second is not None
        assert same_bits(first, second)
        assert torch.equal(one.hidden, other.hidden)
    assert len(taken) > 8


def test_static_choice_takes_the_own_ranks_replica_and_else_one_for_each_rank_and_expert() -> None:
    table = (0, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 3, 5, 1, 2, 0)
    workload = workload_of(placement=table, replica_choice="static")
    for rank in range(4):
        ids = workload.tokens(rank).ids
        logical = torch.tensor(table)[ids.long()]
        held = torch.tensor(table).view(4, -1)[rank]
        assert bool((are_local(ids, rank, 4) == torch.isin(logical, held)).all())
        pairs = set(zip(logical.flatten().tolist(), ids.flatten().tolist(), strict=True))
        assert len(pairs) == len(logical.unique())


def test_dynamic_choice_takes_each_replica_alike_often() -> None:
    slots = Slots(ExpertGroup(4, 2, 1), (0, 0, 0, 1))
    workload = make_workload(
        numerics="gaussian",
        hidden_size=8,
        intermediate_size=8,
        num_experts=2,
        topk=1,
        ep_size=4,
        seed=1,
        routing="uniform",
        tokens_per_rank=(6000, 0, 0, 0),
        dispatch_dtype="bf16",
        placement=slots.experts,
        device="cpu",
    )
    counts = torch.bincount(workload.routing_of(0, 6000).flatten(), minlength=4).tolist()
    assert all(850 < count < 1150 for count in counts[:3])
    assert 2700 < counts[3] < 3300


def test_shared_slots_are_the_own_ranks_behind_the_routed_ones() -> None:
    workload = workload_of(shared_experts=2)
    for rank in range(4):
        batch = workload.tokens(rank)
        assert batch.ids.shape == (TOKENS, 5)
        assert batch.ids[:, 3:].tolist() == [[rank * 4 + 2, rank * 4 + 3]] * TOKENS
        assert int(recv_counts(batch.ids, 4, 4)[rank]) == TOKENS
        assert bool((batch.ids[:, :3] % 4 < 2).all())


def test_shared_slots_of_gaussian_inputs_have_the_weight_of_production() -> None:
    weights = workload_of(numerics="gaussian", shared_experts=2).tokens(0).weights
    alone = workload_of(numerics="gaussian").tokens(0).weights
    assert torch.equal(weights[:, :3], alone)
    assert weights[:, 3:].unique().tolist() == [pytest.approx(0.4)]


@pytest.mark.parametrize("shared", [0, 1])
def test_dropped_slots_leave_each_token_one_and_dropped_tokens_come_back_as_zeros(shared: int) -> None:
    keys = {"shared_experts": shared, "topk": 4}
    plain = torch.cat([workload_of(**keys).tokens(rank).ids for rank in range(4)])
    some = workload_of(**keys, dropped_slots=0.5)
    ids = torch.cat([some.tokens(rank).ids for rank in range(4)])
    assert bool(((ids == plain) | (ids == -1)).all())
    assert bool((ids >= 0).any(1).all())
    assert 0.3 < float((ids[:, :4] < 0).float().mean()) < 0.6
    most = torch.cat([workload_of(**keys, dropped_slots=1).tokens(rank).ids for rank in range(4)])
    assert (most >= 0).sum(1).tolist() == [1] * len(most)
    whole = workload_of(**keys, dropped_tokens=0.4)
    batch = whole.tokens(1)
    gone = (batch.ids < 0).all(1)
    assert 0 < int(gone.sum()) < TOKENS
    assert bool((batch.ids[~gone] >= 0).all())
    expected = whole.expected(batch)
    assert expected is not None
    assert bool((expected.view(torch.int16)[gone] == 0).all())
    assert bool(expected[~gone].any(1).all())


def test_rank_with_an_expert_in_two_slots_is_a_blind_spot() -> None:
    assert not any("two slots" in text for text in workload_of(placement=(*range(8), *range(8))).blind_spots)
    doubled = workload_of(placement=(0, 0, 1, 2, 3, 4, 5, 6, 7, 7, 1, 2, 3, 4, 5, 6))
    assert any("2 of 4 ranks hold an expert in two slots" in text for text in doubled.blind_spots)
