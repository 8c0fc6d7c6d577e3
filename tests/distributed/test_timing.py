"""Timed iterations on real ranks: the slowest rank, the end of timing, and the check of the last output."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import msgspec
import pytest
import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.case.stages import LAYER_STAGES, Stage
from distbench.distributed.session import Session
from distbench.pipeline.run_case import run_case
from distbench.pipeline.timing import Timer
from distbench.transport.collective.transport import CollectiveTransport
from distbench.verify.records import NO_DIFFERENCE, Outcome
from distbench.verify.verdict import judge
from tests.cases import tiny_case
from tests.ranks import on_ranks

SLOW_S = 0.003
DATA = Path(__file__).parents[1] / "data"


def outcome_of(session: Session, case: Case) -> Outcome | None:
    return run_case(session, case)


def one_slow_rank(session: Session, case: Case) -> Any:
    def layer(mark: Callable[[Stage], None]) -> Tensor:
        for stage in LAYER_STAGES:
            mark(stage)
            if stage == Stage.EXPERTS and session.rank == 1:
                time.sleep(SLOW_S)
        return torch.zeros(1, 2)

    return Timer(session, case).time(layer, torch.zeros(1, 2))


def one_bit(rows: Tensor) -> None:
    rows.view(torch.uint8)[0, 2] ^= 1


def a_whole_row(rows: Tensor) -> None:
    rows[0].zero_()


def damaged_at_last(session: Session, case: Case, damage: Callable[[Tensor], object]) -> Outcome | None:
    combine = CollectiveTransport.combine
    calls = 0

    def damaging(transport: CollectiveTransport, expert_out: Tensor, ids: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        rows = combine(transport, expert_out, ids)
        # 4 checked passes, then padded and truncated with one warm-up and three iterations each.
        if session.rank == 1 and calls == 4 + 4 + 4:
            damage(rows)
        return rows

    with patch.object(CollectiveTransport, "combine", damaging):
        return run_case(session, case)


def rounding_case(folder: Path, mode: Callable[[int], str], **values: Any) -> Case:
    """Gaussian case whose kernel of a bucket adds by `mode(bucket)`, and whose limit is in the bucket of 32."""
    head, *rows = (DATA / "atomic.csv").read_text().splitlines()
    table = folder / "kernels.csv"
    told = [row.replace("_atomic", f"_{mode(int(row.split(',')[2]))}") for row in rows]
    table.write_text("\n".join([head, *told]) + "\n")
    layer = {"num_experts": 8, "topk": 4, "tokens": 16, "max_dispatch_tokens_per_rank": 512, "limit": "max-recv"}
    timed = {"numerics": "gaussian", "kernel_table": str(table), "iterations": 3, "warmup": 1}
    return tiny_case(2, **layer | timed | values)


def only_the_cut_is_atomic(bucket: int) -> str:
    return "atomic" if bucket < 128 else "reduce"


@pytest.mark.parametrize("align", ["barrier", "free"])
def test_both_arms_are_timed_on_all_ranks(align: str) -> None:
    case = tiny_case(2, iterations=7, warmup=1, align=align, flush_l2=True)
    outcome = on_ranks(2, outcome_of, case)[0]
    assert outcome.judgement.verdict.value == "PASS"
    first, second = outcome.gathered.observations
    for arm in ("padded", "truncated"):
        assert first.timed[arm].flushed_bytes == 256 << 20
        assert first.timed[arm].slowest_us == second.timed[arm].slowest_us
        layer = first.timed[arm].slowest_us["layer"]
        assert layer == [max(pair) for pair in zip(first.timed[arm].layer_us, second.timed[arm].layer_us, strict=True)]
        assert len(layer) == 7


def test_case_without_iterations_is_not_timed() -> None:
    assert on_ranks(2, outcome_of, tiny_case(2))[0].gathered.observations[0].timed == {}


def test_stage_time_is_that_of_the_slowest_rank() -> None:
    for timed in on_ranks(2, one_slow_rank, tiny_case(2, iterations=5, warmup=0)):
        assert min(timed.slowest_us["experts"]) >= SLOW_S * 1e6


def test_timing_stops_once_the_median_error_is_reached() -> None:
    timed = on_ranks(2, one_slow_rank, tiny_case(2, iterations=400, warmup=0, median_error=1.0))
    assert [len(one.layer_us) for one in timed] == [20, 20]


def test_damage_in_the_last_timed_iteration_is_corrupt() -> None:
    outcome = on_ranks(2, damaged_at_last, tiny_case(2, iterations=3, warmup=1), one_bit)[0]
    assert outcome.judgement.verdict.value == "CORRUPT"
    (reason,) = outcome.judgement.reasons
    assert (reason.code, reason.rank) == ("timed-differs", 1)
    assert "truncated" in reason.message


@pytest.mark.parametrize(("require", "verdict"), [("tolerance", "PASS"), ("bitwise", "DRIFT")])
def test_timed_atomic_kernel_gives_the_verdict_of_its_requirement(tmp_path: Path, require: str, verdict: str) -> None:
    outcome = on_ranks(2, outcome_of, rounding_case(tmp_path, only_the_cut_is_atomic, require=require))[0]
    assert outcome.judgement.verdict.value == verdict
    first, *again = outcome.judgement.reasons
    assert first.code == "kernel-drift"
    assert {one.code for one in again} == {"timed-differs"}
    assert all("adds in another order each time" in one.message for one in again)
    assert all(record.timed["padded"].last.equal for record in outcome.gathered.observations)


@pytest.mark.parametrize("require", ["tolerance", "bitwise"])
@pytest.mark.parametrize(
    ("mode", "damage"),
    [(only_the_cut_is_atomic, a_whole_row), (lambda _: "atomic", a_whole_row), (lambda _: "reduce", one_bit)],
    ids=["beyond the tolerance", "beyond it where nothing repeats", "one bit of an ordered sum"],
)
def test_timed_damage_that_no_summation_order_explains_is_corrupt(
    tmp_path: Path, mode: Callable[[int], str], damage: Callable[[Tensor], object], require: str
) -> None:
    outcome = on_ranks(2, damaged_at_last, rounding_case(tmp_path, mode, require=require), damage)[0]
    assert outcome.judgement.verdict.value == "CORRUPT"
    timed = {reason.rank: reason.message for reason in outcome.judgement.reasons if reason.code == "timed-differs"}
    assert "order" not in timed[1]


@pytest.mark.parametrize(("require", "verdict"), [("tolerance", "PASS"), ("bitwise", "NONDETERMINISTIC")])
def test_padded_kernel_that_differs_only_when_timed_is_nondeterministic(
    tmp_path: Path, require: str, verdict: str
) -> None:
    outcome = on_ranks(2, outcome_of, rounding_case(tmp_path, lambda _: "atomic", require=require))[0]
    alike = [msgspec.structs.replace(record, divergences=[]) for record in outcome.gathered.observations]
    same = dict.fromkeys(outcome.gathered.comparisons, NO_DIFFERENCE)
    found = judge(outcome.resolved, msgspec.structs.replace(outcome.gathered, observations=alike, comparisons=same))
    assert (found.verdict.value, found.reasons[0].code) == (verdict, "timed-differs")


@pytest.mark.parametrize("device", ["cuda"])
def test_unavailable_device_is_unsupported_on_all_ranks(device: str) -> None:
    outcome = on_ranks(2, outcome_of, tiny_case(2, device=device))[0]
    assert outcome.judgement.verdict.value == "UNSUPPORTED"
