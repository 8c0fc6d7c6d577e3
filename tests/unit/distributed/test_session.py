"""Sharing of a node's cores among its ranks."""

from __future__ import annotations

import os

import pytest
import torch

from distbench.distributed import session

ALLOWED = {2, 3, 8, 9}


@pytest.mark.parametrize(
    ("local_ranks", "usable", "threads", "pinned"),
    [
        (1, 4, 4, [None]),
        (2, 4, 2, [None] * 2),
        (4, 4, 1, [None] * 4),
        (8, 4, 1, [2, 3, 8, 9, 2, 3, 8, 9]),
        (6, 4, 1, [None] * 6),  # two cores would have two ranks each, and two one rank
        (8, 2, 1, [None] * 8),  # with a quota the free cores are unknown
    ],
)
def test_ranks_are_pinned_to_equal_shares_of_cores_or_not_at_all(
    local_ranks: int, usable: int, threads: int, pinned: list[int | None], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[int] = []
    batched: list[int] = []
    monkeypatch.setattr(session, "usable_cores", lambda: usable)
    monkeypatch.setattr(torch, "set_num_threads", told.append)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: ALLOWED)
    monkeypatch.setattr(os, "sched_setscheduler", lambda _, policy, __: batched.append(policy))
    found = []
    for rank in range(local_ranks):
        chosen: list[int | None] = [None]
        monkeypatch.setattr(os, "sched_setaffinity", lambda _, cores, chosen=chosen: chosen.extend(cores))
        session._share_cores(rank, local_ranks)  # noqa: SLF001 - what a session does before it joins the others
        found.append(chosen[-1])
    assert told == [threads] * local_ranks
    assert found == pinned
    assert batched == ([os.SCHED_BATCH] * local_ranks if local_ranks > usable else [])
