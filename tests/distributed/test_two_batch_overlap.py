"""Two sub-batches in one layer: each arm against the oracle, and faults that only their overlap can have."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import msgspec
import pytest

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.errors import Unsupported, Verdict
from distbench.launcher.preflight import check_case
from distbench.pipeline import layer, run_case
from distbench.pipeline.sub_batches import SubBatch, on_streams
from distbench.transport.collective.transport import CollectiveTransport
from distbench.transport.mori.transport import MoriTransport
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.ranks import on_ranks

RANKS = 4
MORI: dict[str, Any] = {"transport": "mori", "emulate": True}


def overlapped(**changes: Any) -> Case:
    values = {"tokens": (13, 8, 1, 0), "limit": "sum32", "numerics": "exact", "two_batch_overlap": True} | changes
    return tiny_case(RANKS, **values)


def outcome_of(case: Case) -> Outcome:
    found = on_ranks(RANKS, run, case)[0]
    assert isinstance(found, Outcome)
    return found


def run(session: Session, case: Case) -> Outcome | None:
    session.enter(case.ep_size)
    return run_case.run_case(session, case)


@pytest.mark.parametrize(
    "changes",
    [
        {"numerics": "both", "dispatch_dtype": "fp8", "repeats": 2, "iterations": 2, "warmup": 0},
        {"tokens": (0, 1, 0, 2), "limit": "off"},
        MORI | {"mori_kernel": "AsyncLL", "iterations": 2, "warmup": 0},
        MORI | {"tokens": (5, 0, 6, 3), "limit": "11", "combine_input": "registered"},
    ],
)
def test_each_arm_of_both_sub_batches_equals_the_oracle(changes: dict[str, Any]) -> None:
    case = overlapped(**changes)
    outcome = outcome_of(case)
    assert outcome.judgement.verdict == Verdict.PASS, outcome.judgement.reasons
    gathered, resolved = outcome.gathered, outcome.resolved
    assert gathered is not None
    assert resolved is not None
    for record in gathered.observations:
        first, second = record.sub_batches
        assert (first.tokens, second.tokens) == (case.tokens[record.rank] // 2, -(-case.tokens[record.rank] // 2))
        assert first.total_recv + second.total_recv == record.total_recv
        for half in record.sub_batches:
            assert half.rows["padded"] == case.capacity
            assert half.rows.get("truncated", case.capacity) == (resolved.limit or case.capacity)
        assert all(one.last.equal for one in record.timed.values())
        assert set(record.timed) == ({"padded", "truncated"} if case.iterations else set())


def test_a_limit_holds_for_each_operator_and_what_it_takes_is_named_by_sub_batch() -> None:
    outcome = outcome_of(overlapped(tokens=(12, 12, 12, 12), limit="8", policy="unchecked"))
    assert outcome.judgement.verdict == Verdict.UNDER_LIMIT
    assert outcome.gathered is not None
    for record in outcome.gathered.observations:
        lost = {half.name: half.total_recv - 8 for half in record.sub_batches}
        assert record.lost.rows == sum(lost.values())
        cuts = [one for one in record.divergences if (one.stage, one.arm) == ("truncate", "truncated")]
        assert {one.sub_batch: one.rows for one in cuts} == lost
    largest = max(half.total_recv for record in outcome.gathered.observations for half in record.sub_batches)
    assert f"{largest} rows in a sub-batch" in " ".join(one.message for one in outcome.judgement.reasons)
    enough = outcome_of(overlapped(tokens=(12, 12, 12, 12), limit=str(largest)))
    assert enough.judgement.verdict == Verdict.PASS


@pytest.mark.parametrize(
    ("fault", "stage"),
    [
        ("receive-forgotten:sub_batch=B", "dispatch"),
        ("combine-receive-forgotten:sub_batch=A", "combine"),
        ("stream-wait-missing:sub_batch=B", "combine"),
        ("send-buffer-reused:sub_batch=A", "dispatch"),
        ("ids-of-the-other-sub-batch:sub_batch=B", "combine"),
    ],
)
def test_faults_of_overlap_are_found_at_their_stage_and_in_their_sub_batch(fault: str, stage: str) -> None:
    outcome = outcome_of(overlapped(tokens=(12, 12, 12, 12), inject=f"{fault},arm=truncated"))
    assert outcome.judgement.verdict == Verdict.CORRUPT
    first = outcome.judgement.first_divergence
    assert first is not None
    assert (first.stage, first.arm, first.sub_batch) == (stage, "truncated", fault[-1])
    assert f"truncated, sub-batch {fault[-1]}, {stage}" in outcome.judgement.reasons[0].message
    assert outcome.diagnosis[0].cause.endswith(f"in sub-batch {fault[-1]}")


def one_operator(transports: list[Any]) -> None:
    """Give B the operator of A, as a cache that forgets the instance would."""
    transports[1]._op = transports[0]._op


def swapped(halves: tuple[SubBatch, ...]) -> tuple[SubBatch, ...]:
    """Combine each sub-batch by the other's transport."""
    first, second = halves
    first.transport.combine_recv, second.transport.combine_recv = (  # type: ignore[method-assign]
        second.transport.combine_recv,
        first.transport.combine_recv,
    )
    return halves


def mutated(session: Session, case: Case, change: Callable[[list[Any]], None]) -> Outcome | str | None:
    session.enter(case.ep_size)

    def changed(case: Case, transports: list[Any], device: Any) -> list[Any]:
        change(transports)
        return on_streams(case, transports, device)

    with patch("distbench.pipeline.run_case.on_streams", changed):
        return run_case.run_case(session, case)


def exchanged(session: Session, case: Case, _: object) -> Outcome | None:
    session.enter(case.ep_size)
    right = layer.run_overlapped

    def changed(halves: tuple[SubBatch, ...], *rest: Any) -> Any:
        return right(swapped(halves), *rest)

    with patch("distbench.pipeline.parts.run_overlapped", changed):
        return run_case.run_case(session, case)


def test_one_operator_for_both_sub_batches_is_found_at_the_second_dispatch() -> None:
    """MoRI's counter of received rows goes on where no combine has set it back, and A's combine has lost its rows."""
    (outcome, *_) = on_ranks(RANKS, mutated, overlapped(tokens=(12, 12, 12, 12), **MORI), one_operator)
    assert outcome.judgement.verdict == Verdict.BASELINE_WRONG
    first = outcome.judgement.first_divergence
    assert (first.stage, first.sub_batch) == ("dispatch", "B")
    wrong = {one.sub_batch for record in outcome.gathered.observations for one in record.divergences}
    assert "A" in " ".join(wrong)


def test_results_of_the_other_sub_batch_are_found_at_combine() -> None:
    (outcome, *_) = on_ranks(RANKS, exchanged, overlapped(tokens=(12, 12, 12, 12)), None)
    assert outcome.judgement.verdict == Verdict.BASELINE_WRONG
    assert outcome.judgement.first_divergence.sub_batch == "A and B"


def test_without_overlap_there_is_one_operator_and_no_sub_batch() -> None:
    outcome = outcome_of(overlapped(two_batch_overlap=False))
    assert outcome.gathered is not None
    assert not any(record.sub_batches for record in outcome.gathered.observations)
    assert outcome.gathered.observations[0].transport["kernel"] != "all_to_all"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"policy": "guard"}, "policy = guard"),
        ({"graph": True}, "graph"),
        ({"experts": "aiter", "emulate": True, "caller": "vllm"}, "caller = vllm"),
    ],
)
def test_what_overlap_does_not_do_is_refused(changes: dict[str, Any], what: str) -> None:
    with pytest.raises(Unsupported, match=f"two_batch_overlap: not with {what}"):
        check_case(msgspec.structs.replace(overlapped(), **changes))


def test_rows_travel_while_the_other_sub_batch_computes() -> None:
    """The order is that of `_compute_moe_deepseek_blog_prefill`, SGLang 0.5.23, with both sub-batches begun at once."""
    for kind, changes in ((CollectiveTransport, {}), (MoriTransport, MORI | {"mori_kernel": "AsyncLL"})):
        for calls in on_ranks(RANKS, order_of, overlapped(limit="off", **changes), kind):
            assert calls[: len(PREFILL)] == PREFILL


PREFILL = ["A.dispatch_send", "B.dispatch_send", "A.dispatch_recv", "A.experts", "A.combine_send"]
PREFILL += ["B.dispatch_recv", "B.experts", "B.combine_send", "A.combine_recv", "B.combine_recv"]


def order_of(session: Session, case: Case, kind: type[Any]) -> list[str]:
    session.enter(case.ep_size)
    calls: list[str] = []
    made: list[Any] = []

    def noted(name: str) -> Any:
        right = getattr(kind, name)

        def call(self: Any, *arguments: Any) -> Any:
            if self not in made:
                made.append(self)
            calls.append(f"{'AB'[made.index(self)]}.{name}")
            return right(self, *arguments)

        return patch.object(kind, name, call)

    from distbench.experts.reference import ReferenceExperts  # noqa: PLC0415 - on the ranks alone

    right_experts = ReferenceExperts.__call__

    def experts(self: Any, *arguments: Any) -> Any:
        calls.append(f"{'AB'[sum(one.endswith('.experts') for one in calls) % 2]}.experts")
        return right_experts(self, *arguments)

    with (
        noted("dispatch_send"),
        noted("dispatch_recv"),
        noted("combine_send"),
        noted("combine_recv"),
        patch.object(ReferenceExperts, "__call__", experts),
    ):
        run_case.run_case(session, case)
    return calls
