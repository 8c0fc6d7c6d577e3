"""Timed iterations on real ranks: the slowest rank, when they stop, and a last output that is looked at."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distbench.case import Case
from distbench.rank import run_case
from distbench.session import Session
from distbench.timing import Timer
from distbench.transport.collective import CollectiveTransport
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.ranks import on_ranks

SLOW_S = 0.003


def outcome_of(session: Session, case: Case) -> Outcome | None:
    return run_case(session, case)


def one_slow_rank(session: Session, case: Case) -> Any:
    def layer(mark: Callable[[str], None]) -> Tensor:
        for stage in ("dispatch", "truncate", "experts", "combine"):
            mark(stage)
            if stage == "experts" and session.rank == 1:
                time.sleep(SLOW_S)
        return torch.zeros(1, 2)

    return Timer(session, case).time(layer, torch.zeros(1, 2))


def damaged_at_last(session: Session, case: Case) -> Outcome | None:
    combine = CollectiveTransport.combine
    calls = 0

    def damaging(transport: CollectiveTransport, expert_out: Tensor, ids: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        rows = combine(transport, expert_out, ids)
        # 4 checked passes, then padded and truncated with one warm-up and three iterations each.
        if session.rank == 1 and calls == 4 + 4 + 4:
            rows.view(torch.uint8)[0, 2] ^= 1
        return rows

    with patch.object(CollectiveTransport, "combine", damaging):
        return run_case(session, case)


@pytest.mark.parametrize("align", ["barrier", "free"])
def test_both_arms_are_timed_on_all_ranks(align: str) -> None:
    case = tiny_case(2, iterations=7, warmup=1, align=align, flush_l2=True)
    outcome = on_ranks(2, outcome_of, case)[0]
    assert outcome.judgement.verdict.value == "PASS"
    first, second = outcome.gathered.observations
    for arm in ("padded", "truncated"):
        assert first.timed[arm].slowest_us == second.timed[arm].slowest_us
        layer = first.timed[arm].slowest_us["layer"]
        assert layer == [max(pair) for pair in zip(first.timed[arm].layer_us, second.timed[arm].layer_us, strict=True)]
        assert len(layer) == 7


def test_nothing_is_timed_unless_asked() -> None:
    assert on_ranks(2, outcome_of, tiny_case(2))[0].gathered.observations[0].timed == {}


def test_the_slowest_rank_counts() -> None:
    for timed in on_ranks(2, one_slow_rank, tiny_case(2, iterations=5, warmup=0)):
        assert min(timed.slowest_us["experts"]) >= SLOW_S * 1e6


def test_timing_stops_when_the_median_is_known() -> None:
    timed = on_ranks(2, one_slow_rank, tiny_case(2, iterations=400, warmup=0, median_error=1.0))
    assert [len(one.layer_us) for one in timed] == [20, 20]


def test_damage_in_the_last_timed_iteration_is_corrupt() -> None:
    outcome = on_ranks(2, damaged_at_last, tiny_case(2, iterations=3, warmup=1))[0]
    assert outcome.judgement.verdict.value == "CORRUPT"
    (reason,) = outcome.judgement.reasons
    assert (reason.code, reason.rank) == ("timed-differs", 1)
    assert "truncated" in reason.message


@pytest.mark.parametrize("device", ["cuda"])
def test_ranks_refuse_a_device_that_is_not_there(device: str) -> None:
    outcome = on_ranks(2, outcome_of, tiny_case(2, device=device))[0]
    assert outcome.judgement.verdict.value == "UNSUPPORTED"
