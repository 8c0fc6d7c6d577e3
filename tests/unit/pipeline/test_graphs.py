"""Experts in a graph: captured once per call's buffers, replayed with other rows, refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from distbench.errors import Unsupported
from distbench.experts.base import ExpertInput, Experts, ExpertWeights
from distbench.experts.selection.choice import KernelChoice
from distbench.pipeline.graphs import GraphedExperts, prove_capture
from distbench.workload.batch import TokenBatch
from tests.graphs import FakeGraph, FakeMemory, fake_graphs

ROWS, COLUMNS = 8, 16
REFUSED = "graph: the experts cannot be captured .*; a host read of a device value or a synchronisation in it"


class LiveRows(Experts):
    """Pure torch experts without a host read: live rows times their first weight, zeros elsewhere."""

    def __init__(self, *, reads: bool = False) -> None:
        self.calls: list[int] = []
        self._reads = reads

    def selection(self, rows: int) -> KernelChoice:
        raise NotImplementedError(rows)

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        del weights
        hidden, live = given.hidden, given.num_local_tokens
        output = torch.empty_like(hidden)

        def compute() -> None:
            alive = torch.arange(len(hidden), device=hidden.device) < live
            output.copy_(torch.where(alive.unsqueeze(1), hidden * given.weights[:, :1], 0.0))

        if hidden.device.type == "cpu":
            self.calls.append(int(live))
            if FakeGraph.capturing is not None:
                FakeGraph.capturing.work.append(compute)
                if self._reads:
                    message = "operation not permitted when stream is capturing"
                    raise RuntimeError(message)
        elif self._reads:
            output[: int(live)] = 0
        compute()
        return output


@pytest.fixture
def fake_cuda() -> Iterator[FakeMemory]:
    with fake_graphs() as memory:
        yield memory


class Buffers:
    """Buffers of calls, and their expected results."""

    def __init__(self, device: str) -> None:
        self.hidden = torch.randn(ROWS, COLUMNS, device=device)
        self.weights = torch.rand(ROWS, 2, device=device)
        self.live = torch.tensor([5], dtype=torch.int32, device=device)

    def call(self, experts: GraphedExperts, rows: int = ROWS) -> Tensor:
        nothing = self.hidden.new_empty(0)
        given = ExpertInput(self.hidden[:rows], None, self.weights[:rows], nothing, self.live)
        return experts(given, ExpertWeights(nothing, nothing, nothing))

    def expected(self) -> Tensor:
        rows = self.hidden * self.weights[:, :1]
        rows[int(self.live) :] = 0
        return rows


def replays_are_right(device: str) -> LiveRows:
    inner, buffers = LiveRows(), Buffers(device)
    experts = GraphedExperts(inner)
    for live in (5, ROWS, 1, 0):
        buffers.live.fill_(live)
        buffers.hidden.normal_()
        assert torch.equal(buffers.call(experts), buffers.expected())
        assert int(buffers.live) == live
    assert torch.equal(buffers.call(experts, 4), buffers.expected()[:4])
    return inner


@pytest.mark.usefixtures("fake_cuda")
def test_call_is_captured_once_without_live_rows_and_replayed_with_live_rows() -> None:
    assert replays_are_right("cpu").calls == [5, 0, 0, 0]


@pytest.mark.usefixtures("fake_cuda")
def test_call_that_cannot_be_captured_is_refused_with_the_reason() -> None:
    with pytest.raises(Unsupported, match=REFUSED) as caught:
        Buffers("cpu").call(GraphedExperts(LiveRows(reads=True)))
    assert "not permitted when stream is capturing" in str(caught.value)
    assert "run without --graph" in str(caught.value)
    assert caught.value.exit_code == 77


@pytest.mark.usefixtures("fake_cuda")
def test_capture_is_tested_before_any_row_is_sent() -> None:
    nothing = torch.empty(0)
    weights = ExpertWeights(nothing, nothing, nothing)
    like = TokenBatch(torch.ones(2, COLUMNS), None, torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int32))
    inner = LiveRows()
    prove_capture(inner, weights, like, ROWS)
    assert inner.calls == [0, 0]
    with pytest.raises(Unsupported, match=REFUSED):
        prove_capture(LiveRows(reads=True), weights, like, ROWS)


class Failing(LiveRows):
    """Experts that raise, in the call before the capture or in the captured one."""

    def __init__(self, error: Exception, *, captured: bool) -> None:
        super().__init__()
        self._error, self._captured = error, captured

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        if (FakeGraph.capturing is not None) is self._captured:
            raise self._error
        return super().__call__(given, weights)


ILLEGAL = torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory. 2 GiB allocated in private pools (e.g., CUDA Graphs)")
INVALIDATED = "CUDA error: operation failed due to a previous error during capture"


def invalidated() -> None:
    raise torch.AcceleratorError(INVALIDATED)


@pytest.mark.parametrize("ended", [lambda: None, invalidated], ids=["ended", "invalidated"])
@pytest.mark.parametrize("captured", [False, True], ids=["before", "captured"])
@pytest.mark.parametrize("error", [ILLEGAL, OUT_OF_MEMORY], ids=["illegal access", "out of memory"])
def test_error_that_also_occurs_without_a_graph_is_raised_unchanged(
    error: Exception, ended: Callable[[], object], *, captured: bool
) -> None:
    buffers = Buffers("cpu")
    with fake_graphs(ended), pytest.raises(type(error)) as caught:
        buffers.call(GraphedExperts(Failing(error, captured=captured)))
    assert caught.value is error
    assert int(buffers.live) == 5


def test_asynchronous_device_fault_is_raised_unchanged() -> None:
    def late() -> None:
        raise ILLEGAL

    with fake_graphs(synchronized=late), pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        Buffers("cpu").call(GraphedExperts(LiveRows()))


@pytest.mark.parametrize(
    "words",
    [
        "CUDA error: operation would make the legacy stream depend on a capturing blocking stream",
        "CUDA error: operation not permitted when stream is capturing",
        "Cannot copy between CPU and CUDA tensors during CUDA graph capture unless the CPU tensor is pinned.",
    ],
)
def test_operation_forbidden_in_capture_is_refused_and_keeps_the_live_row_count(words: str) -> None:
    buffers = Buffers("cpu")
    with fake_graphs(invalidated), pytest.raises(Unsupported, match=REFUSED) as caught:
        buffers.call(GraphedExperts(Failing(RuntimeError(words), captured=True)))
    assert words in str(caught.value)
    assert int(buffers.live) == 5


def test_capture_that_fails_at_its_end_is_refused() -> None:
    with fake_graphs(invalidated), pytest.raises(Unsupported, match="previous error during capture"):
        Buffers("cpu").call(GraphedExperts(LiveRows()))


class Allocating(LiveRows):
    """Experts whose call allocates 100 bytes per row and keeps 10 as its output, which a graph retains."""

    def __init__(self, memory: FakeMemory) -> None:
        super().__init__()
        self._memory = memory

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        self._memory.take(100 * given.rows)
        self._memory.take(-90 * given.rows)
        output = super().__call__(given, weights)
        if FakeGraph.capturing is None:
            self._memory.take(-10 * given.rows)
        return output


def test_graph_memory_of_an_arm_counts_its_own_graphs_only(fake_cuda: FakeMemory) -> None:
    fake_cuda.take(1000)
    experts, buffers = GraphedExperts(Allocating(fake_cuda)), Buffers("cpu")
    for rows in (ROWS, 4, ROWS):
        buffers.call(experts, rows)
    assert fake_cuda.allocated == 1000 + 10 * (ROWS + 4)
    # Memory of an arm alone: the bytes allocated before, and 100 bytes per row.
    assert fake_cuda.allocated + experts.uncounted_bytes(ROWS) == 1000 + 100 * ROWS
    assert fake_cuda.allocated + experts.uncounted_bytes(4) == 1000 + 100 * 4


@pytest.mark.gpu
def test_pure_torch_experts_replay_in_a_graph_on_a_device() -> None:
    replays_are_right("cuda")


@pytest.mark.gpu
def test_a_host_read_cannot_be_captured_on_a_device() -> None:
    buffers = Buffers("cuda")
    with pytest.raises(Unsupported, match=REFUSED):
        buffers.call(GraphedExperts(LiveRows(reads=True)))
    assert torch.equal(buffers.call(GraphedExperts(LiveRows())), buffers.expected())
