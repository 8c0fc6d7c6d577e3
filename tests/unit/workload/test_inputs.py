"""The workload's facade: every caller gets the same token, and refusals reach the caller."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from distbench.errors import InvalidCase
from distbench.workload import inputs
from distbench.workload.batch import TokenBatch
from distbench.workload.inputs import Workload, make_workload
from distbench.workload.routing import destinations, recv_counts
from distbench.workload.table import Span, span_of

ROUTINGS = ["uniform", "zipf:1.2", "hot-rank:1", "fan-in:2", "local", "duplicates"]


def made(**changes: Any) -> Workload:
    keys: dict[str, Any] = {
        "numerics": "exact",
        "hidden_size": 256,
        "intermediate_size": 128,
        "num_experts": 16,
        "topk": 4,
        "ep_size": 4,
        "seed": 11,
        "routing": "uniform",
        "tokens_per_rank": (5, 0, 7, 3),
        "dispatch_dtype": "bf16",
        "device": "cpu",
    }
    return make_workload(**(keys | changes))


def raw(batch: TokenBatch) -> list[Tensor]:
    return [part.view(torch.uint8) for part in batch if part is not None]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("numerics", ["exact", "gaussian"])
def test_received_rows_equal_the_tokens_that_were_sent(routing: str, dtype: str, numerics: str) -> None:
    workload = made(routing=routing, dispatch_dtype=dtype, numerics=numerics)
    ranks, tokens = torch.tensor([2, 0, 3, 2, 0]), torch.tensor([6, 4, 0, 1, 4])
    received = raw(workload.token_rows(ranks, tokens))
    whole = {rank: raw(workload.tokens(rank)) for rank in range(4)}
    for row, (rank, token) in enumerate(zip(ranks.tolist(), tokens.tolist(), strict=True)):
        assert all(torch.equal(part[row], sent[token]) for part, sent in zip(received, whole[rank], strict=True))
    index = torch.tensor([6, 2])
    some = raw(workload.tokens(2, index))
    assert all(torch.equal(part, sent[index]) for part, sent in zip(some, whole[2], strict=True))


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("numerics", ["exact", "gaussian"])
def test_tokens_made_together_equal_tokens_made_alone(
    routing: str, dtype: str, numerics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    together = made(routing=routing, dispatch_dtype=dtype, numerics=numerics)
    monkeypatch.setattr(inputs, "span_of", lambda *_: None)
    alone = made(routing=routing, dispatch_dtype=dtype, numerics=numerics)
    for ranks, tokens in (([2, 0, 3, 2, 0], [6, 4, 0, 1, 4]), ([0, 1, 2, 3], [0, 6, 3, 2]), ([2], [0])):
        asked = torch.tensor(ranks), torch.tensor(tokens)
        assert all(map(torch.equal, raw(together.token_rows(*asked)), raw(alone.token_rows(*asked))))
        assert torch.equal(together.experts_of(*asked), alone.experts_of(*asked))


@pytest.mark.parametrize("changes", [{}, {"dispatch_dtype": "fp8"}, {"combine_quant": "fp8_direct_cast"}])
@pytest.mark.parametrize("routing", ["uniform", "fan-in:2"])
def test_one_oracle_for_own_and_received_rows_gives_the_bits_of_two(routing: str, changes: dict[str, Any]) -> None:
    workload = made(routing=routing, **changes)
    for rank in range(4):
        arriving = workload.arriving(rank)
        assert arriving is not None
        ranks, tokens_there, received = arriving
        there = destinations(workload.experts_of(ranks, tokens_there), 4, 4)[:, rank]
        everyone = [recv_counts(workload.tokens(peer).ids, 4, 4)[rank] for peer in range(4)]
        assert there.all()
        assert torch.bincount(ranks, minlength=4).tolist() == [int(count) for count in everyone]
        assert all(map(torch.equal, raw(received), raw(workload.token_rows(ranks, tokens_there))))
        own = workload.tokens(rank)
        tokens, rows = workload.expected_together(rank, own, ranks, received)
        expected, expected_rows = workload.expected(own), workload.expected_rows(rank, received)
        assert tokens is not None
        assert rows is not None
        assert expected is not None
        assert expected_rows is not None
        assert torch.equal(tokens.view(torch.int16), expected.view(torch.int16))
        assert torch.equal(rows.view(torch.int16), expected_rows.view(torch.int16))


def test_changed_rows_do_not_change_tokens_made_together() -> None:
    workload = made()
    before = raw(workload.tokens(2))
    changed = workload.tokens(2)
    for part in (changed.hidden, changed.weights, changed.ids):
        part.fill_(3)
    assert all(map(torch.equal, raw(workload.tokens(2)), before))


@pytest.mark.parametrize(("ranks", "tokens"), [([0, 4], [0, 0]), ([1, 2], [3, 7]), ([0], [-1]), ([-1], [0])])
def test_tokens_outside_of_a_case_are_made_alone(ranks: list[int], tokens: list[int]) -> None:
    asked = torch.tensor(ranks), torch.tensor(tokens)
    assert Span(4, 7).places(*asked) is None
    assert len(made().token_rows(*asked).ids) == len(ranks)


def test_large_cases_have_no_table() -> None:
    cpu, device = torch.device("cpu"), torch.device("cuda")
    assert span_of((5, 0, 7, 3), 256, cpu) == Span(4, 7)
    assert span_of((512,) * 2, 7168, cpu) is None
    assert span_of((4096,) * 2, 7168, device) == Span(2, 4096)
    assert span_of((4096,) * 8, 7168, device) is None
    assert span_of((1 << 30, 0), 16, device) is None


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize("numerics", ["exact", "gaussian"])
def test_tensors_of_a_workload_have_the_documented_types_and_shapes(dtype: str, numerics: str) -> None:
    workload = made(dispatch_dtype=dtype, numerics=numerics)
    for rank, count in enumerate((5, 0, 7, 3)):
        batch = workload.tokens(rank)
        assert batch.hidden.shape == (count, 256)
        assert batch.hidden.dtype == (torch.float8_e4m3fn if dtype == "fp8" else torch.bfloat16)
        assert (batch.weights.shape, batch.weights.dtype) == ((count, 4), torch.float32)
        assert (batch.ids.shape, batch.ids.dtype) == ((count, 4), torch.int32)
        assert all(part.is_contiguous() for part in batch if part is not None)
        if dtype == "fp8":
            assert batch.scales is not None
            assert (batch.scales.shape, batch.scales.dtype) == ((count, 2), torch.float32)
        else:
            assert batch.scales is None
    w1, w2 = workload.local_weights(2)
    assert (w1.shape, w2.shape) == ((4, 256, 256), (4, 256, 128))
    assert workload.experts_per_rank == 4


@pytest.mark.parametrize("numerics", ["exact", "gaussian"])
def test_weights_do_not_depend_on_the_number_of_ranks(numerics: str) -> None:
    few, many = made(numerics=numerics), made(numerics=numerics, ep_size=8, tokens_per_rank=(1,) * 8)
    for rank in range(4):
        halves = [
            torch.cat(parts)
            for parts in zip(many.local_weights(2 * rank), many.local_weights(2 * rank + 1), strict=True)
        ]
        assert all(torch.equal(part, half) for part, half in zip(few.local_weights(rank), halves, strict=True))
    assert torch.equal(few.tokens(0).hidden[:1], many.tokens(0).hidden)


@pytest.mark.parametrize("numerics", ["exact", "gaussian"])
def test_seed_changes_every_tensor(numerics: str) -> None:
    one, other = made(numerics=numerics), made(numerics=numerics, seed=12)
    pairs = zip(raw(one.tokens(2)), raw(other.tokens(2)), strict=True)
    assert not any(torch.equal(left, right) for left, right in pairs)
    pairs = zip(one.local_weights(0), other.local_weights(0), strict=True)
    assert not any(torch.equal(left, right) for left, right in pairs)


def test_tokens_differ_between_ranks_and_positions() -> None:
    workload = made(tokens_per_rank=(64,) * 4)
    hidden = torch.cat([workload.tokens(rank).hidden for rank in range(4)])
    assert torch.unique(hidden.float(), dim=0).shape[0] == 256


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"routing": "fan-in:4"}, "R is allowed from 0 to 3"),
        ({"routing": "sideways"}, "allowed are uniform"),
        ({"routing": "local", "topk": 5}, "topk = 5"),
        ({"topk": 300, "num_experts": 512}, "topk = 300"),
        ({"hidden_size": 192, "dispatch_dtype": "fp8"}, "hidden_size = 192"),
    ],
)
def test_workload_that_does_not_fit_is_refused_with_its_reason(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(InvalidCase, match=said):
        made(**changes)
