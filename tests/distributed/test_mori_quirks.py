"""Bugs of public MoRI releases, and misuse that they do not refuse: each gets the right verdict on the right rank."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NoReturn
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.errors import DistbenchError, Verdict
from distbench.pipeline import passes
from distbench.pipeline.run_case import run_case
from distbench.pipeline.timed_arms import ArmTimes, time_arms
from distbench.transport.base import Dispatched
from distbench.transport.mori import config
from distbench.transport.mori import emulated as stand_in
from distbench.transport.mori import transport as mori
from distbench.transport.mori.emulated import _jit_loader, ops, quirks
from distbench.transport.mori.emulated.buffers import allocate
from distbench.transport.mori.transport import MoriTransport
from distbench.utils.amd_arch import arch_of
from distbench.verify.records import Outcome
from tests.cases import tiny_case
from tests.ranks import on_ranks

KERNELS = ("IntraNode", "IntraNodeLL", "InterNodeV1", "InterNodeV1LL", "AsyncLL")
Run = Callable[[Session, Case], Outcome | None]


def mori_case(ranks: int = 4, **values: Any) -> Case:
    return tiny_case(ranks, transport="mori", emulate=True, **values)


def run(session: Session, case: Case) -> Outcome | None:
    return run_case(session, case) if session.enter(case.ep_size) else None


def raised(session: Session, case: Case, function: Run) -> str:
    """Error message that every rank raises, or an empty text; an error on some ranks only would hang the others."""
    try:
        function(session, case)
    except (DistbenchError, RuntimeError, ValueError) as error:
        return str(error)
    return ""


def verdict_of(case: Case, function: Run = run) -> tuple[Verdict, str]:
    """Verdict, and the first wrong stage (empty if there is none)."""
    outcome: Outcome = on_ranks(case.ep_size, function, case)[0]
    first = outcome.judgement.first_divergence
    return outcome.judgement.verdict, first.stage if first else ""


@pytest.mark.parametrize("experts", ["reference", "aiter"])
@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("kernel", KERNELS)
def test_every_kernel_type_passes_on_one_node_and_on_two(kernel: str, ranks: int, experts: str) -> None:
    fp8 = {"dispatch_dtype": "fp8", "routing": "duplicates", "tokens": [7, *[0] * (ranks - 1)]}
    for nodes in (1,) if kernel.startswith("IntraNode") else (1, 2):
        for values in ({}, fp8 | {"cu_count": 256}, fp8 | {"cu_count": 304}):
            case = mori_case(ranks, mori_kernel=kernel, gpu_per_node=ranks // nodes, experts=experts, **values)
            assert verdict_of(case) == (Verdict.PASS, "")


@pytest.mark.parametrize("cu_count", [304, 256])
@pytest.mark.parametrize("quant", ["fp8_direct_cast", "fp8_blockwise"])
def test_a_quantised_combine_passes_bit_for_bit(quant: str, cu_count: int) -> None:
    for dtype, routing in (("bf16", "uniform"), ("fp8", "fan-in:1")):
        case = mori_case(combine_quant=quant, dispatch_dtype=dtype, routing=routing, cu_count=cu_count)
        assert verdict_of(case) == (Verdict.PASS, "")


def narrower_then_wider(session: Session, narrow: Case, wide: Case) -> list[Verdict | None]:
    outcomes = [run(session, case) for case in (wide, narrow, wide, narrow)]
    return [outcome.judgement.verdict if outcome else None for outcome in outcomes]


@pytest.mark.parametrize("kernel", KERNELS)
def test_narrower_and_wider_groups_of_one_launch_pass(kernel: str) -> None:
    found = on_ranks(4, narrower_then_wider, mori_case(2, mori_kernel=kernel), mori_case(4, mori_kernel=kernel))
    assert found[0] == [Verdict.PASS] * 4
    assert found[3] == [None] * 4


def one_after_the_other(session: Session, cases: tuple[Case, ...]) -> list[Verdict | None]:
    outcomes = [run(session, case) for case in cases]
    return [outcome.judgement.verdict if outcome else None for outcome in outcomes]


@pytest.mark.parametrize("kernel", ["InterNodeV1", "InterNodeV1LL", "AsyncLL"])
def test_case_that_needs_a_larger_heap_than_the_one_before_passes(kernel: str) -> None:
    cases = tuple(mori_case(2, mori_kernel=kernel, max_dispatch_tokens_per_rank=most) for most in (64, 65536))
    assert on_ranks(2, one_after_the_other, cases)[0] == [Verdict.PASS] * 2


def with_kernels_of_before(session: Session, narrow: Case, wide: Case) -> str:
    """Run in a second world with kernels that were initialised for the first."""
    run(session, wide)
    with ExitStack() as patches:
        patches.enter_context(patch("distbench.transport.mori.world._kernels", lambda _: {}))
        patches.enter_context(patch.object(_jit_loader, "trap", raising))
        return raised(session, narrow, run)


def test_kernel_initialised_for_a_finalised_world_is_a_fault() -> None:
    cases = [mori_case(ranks, mori_kernel="AsyncLL") for ranks in (2, 4)]
    assert "shmem world that was finalised" in on_ranks(4, with_kernels_of_before, *cases)[0]


def without_a_view_of_kernels(session: Session, narrow: Case, wide: Case) -> list[str]:
    """Run in a second world with a release that hides its kernels; return the error of each rank."""
    run(session, wide)
    with patch.object(ops, "_jit_loader", None):
        outcome = run(session, narrow)
    return [str(reason.message) for reason in outcome.judgement.reasons] if outcome else []


def test_second_world_is_refused_if_kernels_cannot_be_unloaded() -> None:
    found = on_ranks(4, without_a_view_of_kernels, mori_case(2), mori_case(4))
    assert "start new ranks for this one" in found[0][0]
    assert found[2:] == [[], []]


ORDINARY: dict[str, Any] = {"limit": "max-recv", "policy": "unchecked"}
LEFT_BY_THE_FIRST_CALL = [
    ("stale-receive", kernel, "dispatch") for kernel in ("IntraNode", "IntraNodeLL", "InterNodeV1LL", "AsyncLL")
] + [
    *(("stale-push", kernel, "combine") for kernel in ("IntraNode", "IntraNodeLL", "AsyncLL")),
    *(("stale-output", kernel, "combine") for kernel in ("IntraNode", "InterNodeV1", "AsyncLL")),
]


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
@pytest.mark.parametrize(("quirk", "kernel", "stage"), LEFT_BY_THE_FIRST_CALL)
def test_stale_rows_of_the_previous_call_are_corrupt(quirk: str, kernel: str, stage: str, dtype: str) -> None:
    """Every arm moves the same rows, so a stale row in a buffer equals the row that the next call should write."""
    case = mori_case(mori_kernel=kernel, mori_habits=quirk, dispatch_dtype=dtype, **ORDINARY)
    assert verdict_of(case) == (Verdict.CORRUPT, stage)
    capped: dict[str, Any] = {"combine_input": "registered", "prealloc_max_recv_tokens": 96, "tokens": 12}
    if kernel.startswith("IntraNode") and quirk != "stale-push":
        assert verdict_of(mori_case(mori_kernel=kernel, mori_habits=quirk, **capped, **ORDINARY)) == (
            Verdict.CORRUPT,
            stage,
        )


def one_rank_keeps_its_output(session: Session, case: Case) -> Outcome | None:
    """Run `case` with a combine on rank 1 that keeps the output of its first call."""
    quirk = case.mori_habits if session.rank == 1 else ""
    with patch.object(mori, "_package", lambda *_: _stand_in(quirk, arch_of(case.cu_count))):
        return run(session, case)


def _stand_in(quirk: str, arch: str) -> Any:
    quirks.assume(quirk, arch)
    return stand_in


def test_stale_output_of_one_rank_is_blamed_on_that_rank() -> None:
    outcome: Outcome = on_ranks(2, one_rank_keeps_its_output, mori_case(2, mori_habits="stale-output", **ORDINARY))[0]
    assert outcome.judgement.verdict is Verdict.CORRUPT
    first = outcome.judgement.first_divergence
    assert first is not None
    assert (first.stage, first.arm, first.rank) == ("combine", "control", 1)


def timed_output(session: Session, case: Case) -> Outcome | None:
    """Run `case` with a combine that writes no output in timed passes."""

    def timed(*arguments: Any) -> ArmTimes:
        with patch.object(quirks, "_assumed", frozenset({"stale-output"})):
            return time_arms(*arguments)

    with patch.object(passes, "time_arms", timed):
        return run(session, case)


def test_timed_pass_that_writes_no_output_is_corrupt() -> None:
    outcome: Outcome = on_ranks(2, timed_output, mori_case(2, iterations=2, warmup=1, **ORDINARY))[0]
    assert outcome.judgement.verdict is Verdict.CORRUPT
    assert {reason.code for reason in outcome.judgement.reasons} == {"timed-differs"}


# The following tests remove the adapter's guards, to show the damage that the guards prevent.


def with_received_ids(session: Session, case: Case) -> Outcome | None:
    """Pass the ids that dispatch returned to combine, a known mistake of callers."""
    dispatch = MoriTransport.dispatch
    received: list[Tensor] = []

    def keep(transport: MoriTransport, *batch: Any) -> Dispatched:
        given = dispatch(transport, *batch)
        received[:] = [given.ids]
        return given

    with ExitStack() as patches:
        patches.enter_context(patch.object(MoriTransport, "dispatch", keep))
        patches.enter_context(patch.object(MoriTransport, "_take_known", taking(lambda _: received[0])))
        patches.enter_context(patch.object(MoriTransport, "combine", first_rows(MoriTransport.combine)))
        return run(session, case)


def taking(routing: Callable[[Tensor], Tensor]) -> Any:
    """Replacement of the adapter's check of ids: it passes on other ids."""

    def take(transport: MoriTransport, ids: Tensor) -> Any:
        assert transport._known is not None
        return transport._known._replace(routing=routing(ids))

    return take


def first_rows(combine: Any) -> Any:
    def combined(transport: MoriTransport, rows: Tensor, ids: Tensor) -> Tensor:
        result: Tensor = combine(transport, rows, ids)[: ids.shape[0]]
        return result

    return combined


def test_received_ids_in_combine_corrupt_rows_between_nodes_without_the_guard() -> None:
    values: dict[str, Any] = {"mori_kernel": "InterNodeV1", "gpu_per_node": 2, "topk": 2}
    spoilt = verdict_of(mori_case(mori_habits="no-row-guard", **values), with_received_ids)
    assert spoilt == (Verdict.BASELINE_WRONG, "combine")
    for found in on_ranks(4, raised, mori_case(**values), with_received_ids):
        assert "indices has 256 rows but this rank dispatched 16" in found


def test_received_ids_in_combine_have_no_effect_within_a_node() -> None:
    assert verdict_of(mori_case(mori_habits="no-row-guard"), with_received_ids) == (Verdict.PASS, "")


def with_rolled_ids(session: Session, case: Case) -> Outcome | None:
    """Pass another tensor of the right shape to combine."""
    with patch.object(MoriTransport, "_take_known", taking(lambda ids: ids.roll(1, 0))):
        return run(session, case)


def test_wrong_ids_of_the_right_shape_in_combine_are_baseline_wrong() -> None:
    case = mori_case(mori_kernel="InterNodeV1", gpu_per_node=2, topk=2)
    assert verdict_of(case, with_rolled_ids) == (Verdict.BASELINE_WRONG, "combine")


def refused_routing(session: Session, case: Case) -> Outcome | None:
    combine = MoriTransport.combine

    def other(transport: MoriTransport, rows: Tensor, ids: Tensor) -> Tensor:
        return combine(transport, rows, ids.roll(1, 0))

    with patch.object(MoriTransport, "combine", other):
        return run(session, case)


def test_adapter_refuses_ids_with_other_content_than_the_dispatched_ones() -> None:
    for found in on_ranks(4, raised, mori_case(), refused_routing):
        assert found.startswith("combine: ids of token 0 are [")
        assert "pass the rank's own routing" in found


def raising(message: str) -> NoReturn:
    raise RuntimeError(message)


@contextmanager
def late_without_barriers(session: Session, *, adapter_waits: bool) -> Iterator[None]:
    """Delay the allocation on one rank; no other rank waits for it unless the adapter does."""
    wait = MoriTransport._wait_for_all

    def late(*arguments: Any) -> Any:
        if session.rank == 1:
            import time  # noqa: PLC0415

            time.sleep(0.3)
        return allocate(*arguments)

    with ExitStack() as patches:
        patches.enter_context(patch("distbench.transport.mori.emulated.moves.allocate", late))
        patches.enter_context(patch.object(quirks, "spin", lambda: raising("waits for a count that was lost")))
        patches.enter_context(patch.object(MoriTransport, "_wait_for_all", wait if adapter_waits else lambda _: None))
        yield


def late_rank(session: Session, case: Case, adapter_waits: bool) -> Outcome | None:
    with late_without_barriers(session, adapter_waits=adapter_waits):
        return run(session, case)


def test_count_is_lost_without_a_constructor_barrier_unless_the_adapter_waits() -> None:
    case = mori_case(mori_habits="no-constructor-barrier")
    assert on_ranks(4, late_rank, case, True)[0].judgement.verdict is Verdict.PASS
    assert on_ranks(4, late_rank, mori_case(), False)[0].judgement.verdict is Verdict.PASS
    with pytest.raises(AssertionError, match="waits for a count that was lost"):
        on_ranks(4, late_rank, case, False)


def past_the_buffer(session: Session, case: Case) -> str:
    """Send more rows than a capped receive buffer holds; every rank's process ends where the GPU would fault."""
    with ExitStack() as patches:
        patches.enter_context(patch("distbench.pipeline.run_case.check_capacity"))
        patches.enter_context(patch.object(quirks, "trap", raising))
        return raised(session, case, run)


@pytest.mark.parametrize(
    ("kernel", "quirk", "message"),
    [
        ("IntraNode", "", "received 16 rows, its buffer has 12"),
        ("IntraNode", "intranode-overflow-assert", "assertion failed: Total recv token overflow"),
        ("IntraNode", "1.2.2", "assertion failed: Total recv token overflow"),
        ("IntraNodeLL", "", "assertion failed: Total recv token overflow"),
        ("IntraNodeLL", "no-overflow-assert", "received 16 rows, its buffer has 12"),
        ("InterNodeV1", "", "assertion failed: Total recv token overflow"),
        ("AsyncLL", "no-overflow-assert", "received 16 rows, its buffer has 12"),
    ],
)
def test_dispatch_beyond_the_receive_buffer_ends_in_the_message_of_its_kernel(
    kernel: str, quirk: str, message: str
) -> None:
    values: dict[str, Any] = {"routing": "local", "prealloc_max_recv_tokens": 12}
    if kernel.startswith("IntraNode"):
        values["combine_input"] = "registered"
    case = mori_case(mori_kernel=kernel, mori_habits=quirk, **values)
    for found in on_ranks(4, past_the_buffer, case):
        assert message in found


def what_an_overflow_overwrites(session: Session, case: Case) -> tuple[bool, bool]:
    """Dispatch twice, once past the buffer's end; return whether the adjacent buffer has changed."""
    session.enter(case.ep_size)
    transport = MoriTransport(session, case)
    buffers = transport._op._buffers
    behind = buffers.combine_out.view(32, 256, torch.bfloat16)
    before = behind.clone()
    from distbench.pipeline.inputs import workload_for  # noqa: PLC0415

    batch = workload_for(case, session.device).tokens(session.rank)
    transport._op.dispatch(batch.hidden, batch.weights, batch.scales, batch.ids)
    return bool((behind == before).all()), int(transport._op._total) > transport.capacity


def test_unchecked_receive_overflow_overwrites_neighbouring_memory() -> None:
    values: dict[str, Any] = {"routing": "fan-in:0", "prealloc_max_recv_tokens": 32, "combine_input": "registered"}
    found = on_ranks(4, what_an_overflow_overwrites, mori_case(mori_kernel="IntraNode", **values))
    assert found == [(False, True), (True, False), (True, False), (True, False)]


def unchecked_kernel(session: Session, case: Case) -> Outcome | None:
    with patch.object(config, "_check_kernel"):
        return run(session, case)


def test_low_latency_kernel_loses_slots_past_the_eighth() -> None:
    values: dict[str, Any] = {"mori_kernel": "IntraNodeLL", "topk": 10, "num_experts": 16}
    verdict, stage = verdict_of(mori_case(**values), unchecked_kernel)
    assert (verdict, stage) == (Verdict.BASELINE_WRONG, "dispatch")
    assert verdict_of(mori_case(mori_habits="ll-all-slots", **values), unchecked_kernel)[0] is Verdict.PASS


def pushed_past_the_cap(session: Session, case: Case) -> bool:
    """Combine with a receive cap from an external buffer; return whether the push reaches the adjacent buffer."""
    session.enter(case.ep_size)
    with patch.object(config, "_check_cap"):
        transport = MoriTransport(session, case)
    from distbench.pipeline.inputs import workload_for  # noqa: PLC0415

    batch = workload_for(case, session.device).tokens(session.rank)
    given = transport.dispatch(batch)
    received = given.hidden.clone()
    transport.combine(torch.full_like(received, 3.0), batch.ids)
    return bool((given.hidden != received).any())


def test_combine_writes_past_a_capped_buffer() -> None:
    case = mori_case(mori_kernel="IntraNode", tokens=8, prealloc_max_recv_tokens=32)
    assert any(on_ranks(4, pushed_past_the_cap, case))


def with_variables(session: Session, case: Case, variables: dict[str, str], buffers: int = 3) -> str:
    """Ending of a run under `variables` without the adapter's own refusal, on a heap for `buffers` of AsyncLL."""
    with ExitStack() as patches:
        patches.enter_context(patch.dict(os.environ, variables))
        patches.enter_context(patch.object(config, "_check_settings", lambda *_: None))
        patches.enter_context(patch.object(config, "async_buffers", lambda _: buffers))
        try:
            outcome = run(session, case)
        except RuntimeError as error:
            return str(error)
        if outcome is None:
            return ""
        return " ".join([outcome.judgement.verdict, *(reason.message for reason in outcome.judgement.reasons)])


REFUSED: dict[str, tuple[dict[str, Any], dict[str, str], str]] = {
    "rail-only": (
        {"mori_kernel": "AsyncLL"},
        {"MORI_ENABLE_RAIL_ONLY": "1"},
        "MORI_ENABLE_RAIL_ONLY is set, but kernelType=4",
    ),
    "relaxed ordering": (
        {"mori_kernel": "InterNodeV1", "mori_habits": "1.2.5.dev20261026"},
        {"MORI_EP_DISABLE_RDMA_ATOMICS": "1", "MORI_IB_ENABLE_RELAXED_ORDERING": "1"},
        "MORI_EP_DISABLE_RDMA_ATOMICS cannot be combined with MORI_IB_ENABLE_RELAXED_ORDERING=1",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_runtime_error_of_the_constructor_is_reported_as_unsupported(name: str) -> None:
    values, variables, words = REFUSED[name]
    found = on_ranks(2, with_variables, mori_case(2, gpu_per_node=1, **values), variables)[0]
    assert found.startswith(f"UNSUPPORTED the installed mori cannot run the case: {words}")
    accepted = mori_case(2, gpu_per_node=1, mori_kernel="InterNodeV1")
    assert on_ranks(2, with_variables, accepted, variables)[0] == "PASS"


def test_asyncll_of_the_nightly_does_not_fit_the_heap_of_older_releases() -> None:
    values: dict[str, Any] = {"mori_kernel": "AsyncLL", "max_dispatch_tokens_per_rank": 65536}
    older, nightly = mori_case(2, **values), mori_case(2, mori_habits="1.2.5.dev20261026", **values)
    assert on_ranks(2, with_variables, older, {}, 3)[0] == "PASS"
    for found in on_ranks(2, with_variables, nightly, {}, 3):
        assert found.startswith("out of symmetric heap memory")
    assert on_ranks(2, with_variables, nightly, {}, 4)[0] == "PASS"
