"""Routing: properties of each kind on every shape, and equal results for every caller."""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from distbench.errors import InvalidCase
from distbench.workload import routing as module
from distbench.workload.routing import destinations, recv_counts, route
from distbench.workload.routing_spec import ExpertGroup, Routing, check_routing, parse_routing

DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
TOKENS = 24
KINDS = ["uniform", "zipf:1.2", "zipf:8", "hot-rank:0", "fan-in:0", "local", "duplicates"]


@st.composite
def groups(draw: st.DrawFn) -> ExpertGroup:
    ep_size, local = draw(st.integers(1, 9)), draw(st.integers(1, 12))
    return ExpertGroup(ep_size, ep_size * local, draw(st.integers(1, min(ep_size * local, 20))))


def routed(text: str, group: ExpertGroup, rank: int = 0, tokens: int = TOKENS, seed: int = 0) -> Tensor:
    index = torch.arange(tokens)
    return route(parse_routing(text), group, seed=seed, ranks=torch.full_like(index, rank), tokens=index)


def owners_of(ids: Tensor, group: ExpertGroup) -> Tensor:
    return ids // group.experts_per_rank


@pytest.mark.parametrize("text", [*KINDS, "zipf:0.3333333333333333", "fan-in:123456789", "zipf:1e-06"])
def test_routing_text_survives_a_round_trip(text: str) -> None:
    assert parse_routing(str(parse_routing(text))) == parse_routing(text)
    assert str(parse_routing(f" {text} ")) == text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "allowed are uniform, zipf:S"),
        ("round-robin", "allowed are uniform, zipf:S"),
        ("uniform:3", "allowed are"),
        ("zipf", "above 0 and at most 8"),
        ("zipf:0", "above 0 and at most 8"),
        ("zipf:-1", "above 0 and at most 8"),
        ("zipf:8.01", "above 0 and at most 8"),
        ("zipf:nan", "above 0 and at most 8"),
        ("zipf:inf", "above 0 and at most 8"),
        ("zipf:1e999", "above 0 and at most 8"),
        ("zipf:x", "for example zipf:1.2"),
        ("fan-in", "R is a rank from 0 up"),
        ("fan-in:-1", "R is a rank from 0 up"),
        ("fan-in:1.5", "R is a rank from 0 up"),
        ("hot-rank:\u0663", "R is a rank from 0 up"),
        ("hot-rank:" + "9" * 5000, "R is a rank from 0 up"),
    ],
)
def test_malformed_routing_text_is_refused(text: str, said: str) -> None:
    with pytest.raises(InvalidCase) as caught:
        parse_routing(text)
    assert said in str(caught.value)
    assert repr(text)[:40] in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("text", "group", "said"),
    [
        ("hot-rank:4", ExpertGroup(4, 16, 2), "with 4 ranks, R is allowed from 0 to 3"),
        ("fan-in:99", ExpertGroup(4, 16, 2), "fan-in:99"),
        ("fan-in:1", ExpertGroup(4, 16, 5), "topk = 5 experts of a token on one rank, which holds 4"),
        ("local", ExpertGroup(4, 16, 5), "topk = 5 experts of a token on one rank, which holds 4"),
    ],
)
def test_routing_that_does_not_fit_is_refused(text: str, group: ExpertGroup, said: str) -> None:
    with pytest.raises(InvalidCase, match=said):
        check_routing(parse_routing(text), group)


@pytest.mark.parametrize("text", KINDS)
@given(groups(), st.integers(0, 2**62), st.data())
def test_every_routing_kind_gives_distinct_valid_experts(
    text: str, group: ExpertGroup, seed: int, data: st.DataObject
) -> None:
    rank = data.draw(st.integers(0, group.ep_size - 1))
    routing = parse_routing(text)
    if routing.kind in ("fan-in", "hot-rank"):
        routing = Routing(routing.kind, data.draw(st.integers(0, group.ep_size - 1)))
    try:
        check_routing(routing, group)
    except InvalidCase:
        assert group.topk > group.experts_per_rank
        return
    ids = routed(str(routing), group, rank, seed=seed)
    assert ids.shape == (TOKENS, group.topk)
    assert ids.dtype == torch.int32
    assert ids.is_contiguous()
    assert int(ids.min()) >= 0
    assert int(ids.max()) < group.num_experts
    assert all(len(set(row)) == group.topk for row in ids.tolist())
    check_owners(routing, group, rank, owners_of(ids, group))


def check_owners(routing: Routing, group: ExpertGroup, rank: int, owners: Tensor) -> None:
    local, topk = group.experts_per_rank, group.topk
    if routing.kind == "local":
        assert bool((owners == rank).all())
    elif routing.kind == "fan-in":
        assert bool((owners == routing.parameter).all())
    elif routing.kind == "hot-rank":
        hot = max(min(math.ceil(topk / 2), local), topk - (group.num_experts - local))
        assert bool(((owners == routing.parameter).sum(1) == hot).all())
    elif routing.kind == "duplicates":
        check_interleaved(group, owners)


def check_interleaved(group: ExpertGroup, owners: Tensor) -> None:
    allowed = min(max(2, math.ceil(group.topk / group.experts_per_rank)), group.ep_size)
    for row in owners.tolist():
        assert len(set(row)) == min(allowed, group.topk)
        assert all(row[slot] == row[slot % allowed] for slot in range(len(row)))
        if group.ep_size > 1:
            assert all(left != right for left, right in pairwise(row))


@pytest.mark.parametrize("text", KINDS)
def test_routing_of_any_slice_equals_that_of_the_whole(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    group = ExpertGroup(4, 32, 5)
    index = torch.tensor([17, 3, 3, 23])
    whole = {rank: routed(text, group, rank) for rank in range(4)}
    ranks = torch.tensor([2, 0, 3, 2])
    picked = route(parse_routing(text), group, seed=0, ranks=ranks, tokens=index)
    assert picked.tolist() == [whole[int(rank)][int(token)].tolist() for rank, token in zip(ranks, index, strict=True)]
    monkeypatch.setattr(module, "_CHUNK_BYTES", 5 * 32 * 8)
    assert torch.equal(routed(text, group, 2), whole[2])


@pytest.mark.parametrize("text", KINDS)
def test_routing_depends_on_seed_rank_and_token(text: str) -> None:
    group = ExpertGroup(4, 64, 4)
    base = routed(text, group)
    assert not torch.equal(base, routed(text, group, seed=1))
    assert not torch.equal(base, routed(text, group, rank=1))
    assert len({tuple(row) for row in base.tolist()}) > TOKENS // 2 or text == "zipf:8"


def test_routing_of_no_tokens_is_empty() -> None:
    assert routed("uniform", ExpertGroup(2, 8, 3), tokens=0).shape == (0, 3)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("text", "digest"),
    [
        ("uniform", "42c3b5ed774de5f4"),
        ("zipf:1.2", "bf54d64c7d7c1618"),
        ("zipf:8", "540ec017680a6d85"),
        ("hot-rank:3", "c7959be9edf678e7"),
        ("fan-in:5", "289c2c535ddf0876"),
        ("local", "f5ccd34c89bc2e66"),
        ("duplicates", "eda421c98ecc38ed"),
    ],
)
def test_routing_equals_its_golden_values(text: str, digest: str, device: str) -> None:
    ranks = torch.arange(8, device=device).repeat_interleave(40)
    tokens = torch.arange(40, device=device).repeat(8)
    ids = route(parse_routing(text), ExpertGroup(8, 128, 8), seed=7, ranks=ranks, tokens=tokens)
    assert hashlib.sha256(bytes(ids.cpu().view(torch.uint8).flatten().tolist())).hexdigest()[:16] == digest


def test_uniform_favours_no_expert_and_no_slot() -> None:
    group = ExpertGroup(4, 16, 4)
    ids = routed("uniform", group, tokens=4000).long()
    for slot in range(4):
        counts = torch.bincount(ids[:, slot], minlength=16).float()
        assert float((counts - 250).abs().max()) < 6 * 250**0.5


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
def test_zipf_routing_draws_experts_by_their_popularity_rank(exponent: float) -> None:
    ids = routed(f"zipf:{exponent}", ExpertGroup(4, 32, 1), tokens=20000).long()
    counts = torch.bincount(ids.flatten(), minlength=32).sort(descending=True).values.double()
    popularity = torch.arange(1, 33).double() ** -exponent
    expected = 20000 * popularity / popularity.sum()
    assert float(((counts - expected).abs() / expected.sqrt())[:8].max()) < 6


def test_popular_experts_of_zipf_depend_on_the_seed() -> None:
    group = ExpertGroup(4, 32, 1)
    favourites = {int(torch.mode(routed("zipf:3", group, seed=seed).flatten()).values) for seed in range(12)}
    assert len(favourites) > 6


def test_hot_rank_routing_shuffles_its_slots() -> None:
    group = ExpertGroup(4, 64, 6)
    hot = (owners_of(routed("hot-rank:2", group, tokens=3000), group) == 2).float().mean(0)
    assert float((hot - 0.5).abs().max()) < 6 * 0.5 / 3000**0.5


def test_destinations_count_a_token_once_and_skip_bad_ids() -> None:
    ids = torch.tensor([[0, 1, 5], [-1, 8, 2**31 - 1], [3, 3, -7]], dtype=torch.int32)
    assert destinations(ids, 2, 4).tolist() == [
        [True, False, True, False],
        [False, False, False, False],
        [False, True, False, False],
    ]
    assert recv_counts(ids, 2, 4).tolist() == [1, 1, 1, 0]
    assert recv_counts(ids[:0], 2, 4).tolist() == [0, 0, 0, 0]


@given(groups())
def test_destinations_are_the_owners(group: ExpertGroup) -> None:
    ids = routed("uniform", group)
    going = destinations(ids, group.experts_per_rank, group.ep_size)
    wanted = [sorted(set(row)) for row in owners_of(ids, group).tolist()]
    assert [row.nonzero().flatten().tolist() for row in going] == wanted
