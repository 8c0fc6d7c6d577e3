"""A case inside a process group that exists: functions in place of parts, and sources found by content."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from distbench import api
from distbench.distributed.in_group import GroupSession
from distbench.distributed.session import Session
from distbench.errors import DistbenchError
from distbench.plugins import Dispatched, ExpertInput, ExpertWeights, TokenBatch
from tests.ranks import on_ranks

RANKS = 2
KEYS = {"model": "tiny", "max_dispatch_tokens_per_rank": 64, "device": "cpu", "tokens": [3, 5]}


class Everyone:
    """Dispatch and combine by all-gather, as a site would write them: every rank takes all rows, and keeps its own."""

    def __init__(self, experts: int, damage: str) -> None:
        self._rank, self._ranks, self._damage = dist.get_rank(), dist.get_world_size(), damage
        self._experts = experts // self._ranks
        self._mine: list[tuple[int, int]] = []

    def dispatch(self, batch: TokenBatch) -> Dispatched:
        everyone: list[Any] = [None] * self._ranks
        dist.all_gather_object(everyone, tuple(batch))
        self._mine = [
            (rank, token)
            for rank, (_, _, _, ids) in enumerate(everyone)
            for token in range(len(ids))
            if (ids[token] // self._experts == self._rank).any()
        ]
        hidden, weights, ids = (
            torch.stack([everyone[rank][field][token] for rank, token in self._mine]) for field in (0, 2, 3)
        )
        if self._damage == "dispatch" and self._rank == 1:
            hidden[0, 0] += 1
        total = len(self._mine) - (self._damage == "lost" and self._rank == 1)
        if self._damage == "raises" and self._rank == 1:
            raise ValueError(total)
        return Dispatched(hidden, None, weights, ids, torch.tensor([total], dtype=torch.int32))

    def combine(self, rows: Tensor, ids: Tensor) -> Tensor:
        everyone: list[Any] = [None] * self._ranks
        dist.all_gather_object(everyone, (self._mine, rows))
        tokens = torch.zeros(len(ids), rows.shape[1])
        for sources, returned in everyone:
            for (rank, token), row in zip(sources, returned, strict=False):
                if rank == self._rank:
                    tokens[token] += row.float()
        if self._damage == "combine" and self._rank == 0:
            tokens[0] *= 2
        return tokens.to(rows.dtype)


def experts(given: ExpertInput, weights: ExpertWeights) -> Tensor:
    """Experts in plain torch."""
    local = (weights.mask.cumsum(0) * weights.mask - 1).tolist()
    rows = given.hidden.new_zeros(given.rows, weights.w2.shape[1])
    for row in range(min(int(given.num_local_tokens), given.rows)):
        total = torch.zeros(weights.w2.shape[1])
        for weight, expert in zip(given.weights[row], given.ids[row].tolist(), strict=True):
            if local[expert] >= 0:
                both = weights.w1[local[expert]].float() @ given.hidden[row].float()
                gate, up = both.chunk(2)
                middle = (torch.nn.functional.silu(gate) * up).bfloat16().float()
                total += ((weights.w2[local[expert]].float() @ middle) * weight).bfloat16().float()
        rows[row] = total.bfloat16()
    return rows


def in_group(_: Session, damage: str, keys: dict[str, Any]) -> tuple[str, str, int, str]:
    """Verdict, stage, rank, and transport of the report on this rank, or the error."""
    parts = Everyone(8, damage)
    given: dict[str, Any] = {"dispatch": parts.dispatch, "combine": parts.combine} if damage != "own" else {}
    if damage in ("", "experts"):
        given["experts"] = experts
    try:
        found = api.run_in_group(None, api.Case(**(KEYS | keys)), **given)
    except DistbenchError as error:
        return type(error).__name__, str(error), -1, ""
    first = found.first_divergence
    return found.verdict.value, first.stage if first else "", first.rank if first else -1, found.case["transport"]


@pytest.mark.parametrize(
    ("damage", "ending"),
    [
        ("own", ("PASS", "", -1, "collective")),
        ("", ("PASS", "", -1, "tests_distributed_test_in_group:Everyone_dispatch")),
        ("dispatch", ("BASELINE_WRONG", "dispatch", 1, "tests_distributed_test_in_group:Everyone_dispatch")),
        ("lost", ("BASELINE_WRONG", "dispatch", 1, "tests_distributed_test_in_group:Everyone_dispatch")),
        ("combine", ("BASELINE_WRONG", "combine", 0, "tests_distributed_test_in_group:Everyone_dispatch")),
    ],
)
def test_functions_are_judged_as_parts_and_every_rank_gets_the_report(
    damage: str, ending: tuple[str, str, int, str]
) -> None:
    numerics = {"numerics": "exact"} if damage else {}
    assert on_ranks(RANKS, in_group, damage, numerics) == [ending] * RANKS


def test_refusal_is_raised_on_every_rank() -> None:
    kind, message, _, _ = on_ranks(RANKS, in_group, "own", {"device": "cuda"})[1]
    assert kind == "Unsupported"
    assert message == "device = cuda: the group has no NCCL; initialise it with nccl, or use device cpu"


def groups_of_two_sessions(_: Session) -> bool:
    """Whether two sessions after each other have one group."""
    first = GroupSession(None)
    first.close()
    second = GroupSession(None)
    second.close()
    return first.group is second.group


def test_sessions_in_one_job_share_a_group() -> None:
    assert on_ranks(RANKS, groups_of_two_sessions) == [True, True]
