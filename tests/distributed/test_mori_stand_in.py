"""Behaviour of the stand-in for MoRI that the adapter does not use: counts, tails, weights; and missing functions."""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from distbench.case.spec import Case
from distbench.distributed.session import Session
from distbench.transport.mori.emulated import ops, shmem
from distbench.transport.mori.emulated.ops import EpDispatchCombineOp
from distbench.transport.mori.transport import MoriTransport
from distbench.transport.mori.world import leave_world
from tests.cases import tiny_case
from tests.ranks import on_ranks

RANKS, TOKENS, TOPK, HIDDEN = 2, 3, 2, 64
# Of 4 experts, 2 on each rank: rank 0 sends 3 rows to itself and 2 to rank 1, which sends 1 and 3.
IDS = ([[0, 1], [0, 2], [3, 1]], [[2, 3], [3, 2], [1, 3]])
RECEIVED = (4, 5)


def operator(session: Session, kernel: str = "IntraNode", **values: Any) -> EpDispatchCombineOp:
    shape: dict[str, Any] = {"hidden_size": HIDDEN, "topk": TOPK, "num_experts": 4, "max_dispatch_tokens_per_rank": 8}
    case = tiny_case(RANKS, transport="mori", emulate=True, mori_kernel=kernel, **shape, **values)
    session.enter(RANKS)
    made: EpDispatchCombineOp = MoriTransport(session, case)._op
    return made


class Given:
    """Input of a dispatch: the tokens of `rank`, all elements `value`."""

    def __init__(self, rank: int, value: float = 1.0) -> None:
        self.hidden = torch.full((TOKENS, HIDDEN), value).bfloat16()
        self.weights = torch.arange(TOKENS * TOPK, dtype=torch.float32).view(TOKENS, TOPK) + 100 * rank
        self.ids = torch.tensor(IDS[rank], dtype=torch.int32)

    def dispatch(self, op: EpDispatchCombineOp, **more: Any) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor]:
        return op.dispatch(self.hidden, self.weights, None, self.ids, **more)


def counts(session: Session, kernel: str) -> list[int]:
    """total_recv after one dispatch, after a second one, and after combine."""
    op, given, found = operator(session, kernel), Given(session.rank), []
    for _ in range(2):
        hidden, _, _, _, total = given.dispatch(op)
        if kernel == "AsyncLL":
            op.dispatch_recv()
        found.append(int(total))
    op.combine(hidden, None, given.ids)
    if kernel == "AsyncLL":
        op.combine_recv()
    return [*found, int(total)]


def test_total_recv_accumulates_over_dispatches_and_combine_resets_it() -> None:
    assert on_ranks(RANKS, counts, "IntraNode") == [[once, 2 * once, 0] for once in RECEIVED]


def test_total_recv_of_asyncll_restarts_per_dispatch_and_combine_keeps_it() -> None:
    assert on_ranks(RANKS, counts, "AsyncLL") == [[once] * 3 for once in RECEIVED]


def tails(session: Session) -> list[set[float]]:
    """Values in the buffer's tail at first, after a larger dispatch, and after a smaller one."""
    op, found = operator(session), []
    for value, tokens in ((5.0, TOKENS), (7.0, 0)):
        given = Given(session.rank, value)
        given.hidden, given.weights, given.ids = (part[:tokens] for part in (given.hidden, given.weights, given.ids))
        hidden, _, _, _, total = given.dispatch(op)
        found.append(set(hidden[int(total) :].flatten().tolist()))
        op.combine(hidden, None, given.ids)
    return found


def test_buffer_tail_is_zero_at_first_and_later_holds_stale_rows() -> None:
    for fresh, stale in on_ranks(RANKS, tails):
        assert fresh == {0.0}
        assert stale == {0.0, 5.0}


def summed_weights(session: Session, kernel: str) -> tuple[list[list[float]], list[list[float]] | None]:
    """Pass the received weights back; return the rank's own weights and the combined ones."""
    op, given = operator(session, kernel), Given(session.rank)
    hidden, weights, _, _, _ = given.dispatch(op)
    if kernel == "AsyncLL":
        op.dispatch_recv()
    _, out = op.combine(hidden, weights, given.ids)
    if kernel == "AsyncLL":
        op.combine_recv()
    return given.weights.tolist(), None if out is None else out[:TOKENS].tolist()


@pytest.mark.parametrize("kernel", ["IntraNode", "InterNodeV1"])
def test_combined_weights_are_multiplied_by_the_ranks_of_a_token(kernel: str) -> None:
    for rank, (own, out) in enumerate(on_ranks(RANKS, summed_weights, kernel)):
        ranks_of_tokens = [len({expert // 2 for expert in row}) for row in IDS[rank]]
        assert out == [[count * one for one in row] for count, row in zip(ranks_of_tokens, own, strict=True)]


def test_combine_without_weights_returns_no_weights() -> None:
    assert all(found is None for found in on_ranks(RANKS, combined_without_weights))


def combined_without_weights(session: Session) -> Tensor | None:
    op, given = operator(session), Given(session.rank)
    hidden = given.dispatch(op)[0]
    return op.combine(hidden, None, given.ids)[1]


def local_counts(session: Session, kernel: str) -> list[list[int]]:
    """Local expert counts before and after the request."""
    op, given = operator(session, kernel), Given(session.rank)
    found = [op.local_expert_count.tolist()]
    hidden = given.dispatch(op, call_local_expert_count=True)[0]
    if kernel == "AsyncLL":
        found.append(op.local_expert_count.tolist())
        op.dispatch_recv(call_local_expert_count=True)
    found.append(op.local_expert_count.tolist())
    op.combine(hidden, None, given.ids)
    return found


def test_local_expert_counts_are_returned_on_request() -> None:
    assert on_ranks(RANKS, local_counts, "IntraNode") == [[[0, 0], [2, 3]], [[0, 0], [3, 4]]]
    assert on_ranks(RANKS, local_counts, "AsyncLL") == [[[0, 0], [0, 0], [2, 3]], [[0, 0], [0, 0], [3, 4]]]


def what_is_not_imitated(session: Session) -> list[str]:
    op, given = operator(session), Given(session.rank)
    calls: list[Any] = [
        lambda: given.dispatch(op, routing=object()),
        lambda: given.dispatch(op, return_routing=True),
        lambda: op.combine(given.hidden, None, given.ids, routing=object()),
        lambda: op.dispatch_standard_moe,
        lambda: shmem.shmem_malloc,
        lambda: EpDispatchCombineOp(config_like(op.config, ops.EpDispatchCombineKernelType.InterNode)),
    ]
    found = [complaint(call) for call in calls]
    v1 = operator(session, "InterNodeV1")
    given.dispatch(v1)
    registered = v1.get_registered_combine_input_buffer(torch.bfloat16, HIDDEN)
    return [*found, complaint(lambda: v1.combine(registered, None, given.ids))]


def config_like(config: Any, kernel: Any) -> Any:
    return type(config)(**vars(config) | {"kernel_type": kernel})


def complaint(call: Any) -> str:
    try:
        call()
    except NotImplementedError as error:
        return str(error)
    return ""


def test_functions_that_the_stand_in_lacks_raise_an_error_that_names_them() -> None:
    for found in on_ranks(RANKS, what_is_not_imitated):
        assert all(one.startswith("mori (emulated): ") for one in found), found
        assert ["routing" in one for one in found] == [True] * 3 + [False] * 4
        assert "InterNode, the predecessor of InterNodeV1" in found[5]
        assert "the registered buffer as what InterNodeV1 reads" in found[6]


def foreign_fp8(session: Session, cu_count: int) -> str:
    """Error of a dispatch with the other device's fp8 type; the device's own type is accepted."""
    op, given = operator(session, cu_count=cu_count), Given(session.rank)
    own, other = torch.float8_e4m3fnuz, torch.float8_e4m3fn
    if cu_count == 256:
        own, other = other, own
    rows = op.dispatch(given.hidden.to(own), given.weights, None, given.ids)[0]
    assert rows.dtype is own
    try:
        op.dispatch(given.hidden.to(other), given.weights, None, given.ids)
    except RuntimeError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("cu_count", "said"), [(304, "float8_e4m3fn, the device has e4m3fnuz"), (256, "has e4m3fn")])
def test_fp8_format_of_another_device_has_no_kernel(cu_count: int, said: str) -> None:
    assert all(said in found for found in on_ranks(RANKS, foreign_fp8, cu_count))


def positions(session: Session) -> list[tuple[int, int]]:
    op, given = operator(session), Given(session.rank)
    hidden = given.dispatch(op)[0]
    found = sorted(op.decode_send_flat_idx(position) for position in op.get_dispatch_src_token_pos().tolist())
    op.combine(hidden, None, given.ids)
    return found


def test_positions_are_decoded_to_rank_and_token() -> None:
    assert on_ranks(RANKS, positions) == [
        [(0, 0), (0, 1), (0, 2), (1, 2)],
        [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)],
    ]


def geometry(session: Session, case: Case) -> tuple[tuple[int, int, int], ...]:
    session.enter(RANKS)
    op = MoriTransport(session, case)._op
    return op.get_launch_config(), op.get_launch_config(is_dispatch=False, block_num=7)


def test_geometry_of_launch_mode_auto_overrides_that_of_the_call() -> None:
    assert on_ranks(RANKS, geometry, tiny_case(RANKS, transport="mori", emulate=True, launch_mode="AUTO"))[0] == (
        (128, -1, 16),
        (128, -1, 16),
    )
    assert on_ranks(RANKS, geometry, tiny_case(RANKS, transport="mori", emulate=True))[0] == ((-1,) * 3, (7, -1, -1))


def joined(session: Session, size: str) -> str:
    """Join a world with a heap of `size`; return the error, or the heap's bytes."""
    leave_world()
    with patch.dict(os.environ, {"MORI_SHMEM_HEAP_SIZE": size}):
        try:
            shmem.shmem_init_attr(shmem.MORI_SHMEM_INIT_WITH_UNIQUEID, session.rank, 1, bytes(128))
        except ValueError as error:
            return str(error)
    size_there = shmem.world().heap.size
    shmem.shmem_finalize()
    return str(size_there)


def test_heap_size_accepted_by_the_adapter_is_that_of_the_stand_in() -> None:
    assert on_ranks(1, joined, "6KiB") == ["6144"]
    assert on_ranks(1, joined, "1T")[0].startswith("no size; write for instance 6G")
