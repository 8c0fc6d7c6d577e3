"""Experts in a graph: captured once for each call's buffers, replayed with other rows, and refused with the reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from distbench.errors import Unsupported
from distbench.experts.selection import KernelChoice
from distbench.graphs import GraphedExperts, prove_capture
from distbench.layer import ExpertWeights
from distbench.workload.batch import TokenBatch

ROWS, COLUMNS = 8, 16
REFUSED = "graph: the experts cannot be captured .*; a host read of a device value or a synchronisation among them"


class FakeGraph:
    """Replays what was captured by doing it again."""

    capturing: FakeGraph | None = None

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def replay(self) -> None:
        for one in self.work:
            one()


class LiveRows:
    """Experts of torch alone, without a host read: live rows times their first weight, zeros elsewhere."""

    def __init__(self, *, reads: bool = False) -> None:
        self.calls: list[int] = []
        self._reads = reads

    def selection(self, rows: int) -> KernelChoice:
        raise NotImplementedError(rows)

    def __call__(  # noqa: PLR0913 - the argument list is aiter's
        self,
        hidden_states: Tensor,
        w1: Tensor,
        w2: Tensor,
        topk_weight: Tensor,
        topk_ids: Tensor,
        *,
        expert_mask: Tensor,
        num_local_tokens: Tensor,
        a1_scale: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        del w1, w2, topk_ids, expert_mask, a1_scale
        output = torch.empty_like(hidden_states, dtype=dtype)

        def compute() -> None:
            live = torch.arange(len(hidden_states), device=hidden_states.device) < num_local_tokens
            output.copy_(torch.where(live.unsqueeze(1), hidden_states * topk_weight[:, :1], 0.0))

        if hidden_states.device.type == "cpu":
            self.calls.append(int(num_local_tokens))
            if FakeGraph.capturing is not None:
                FakeGraph.capturing.work.append(compute)
                if self._reads:
                    message = "operation not permitted when stream is capturing"
                    raise RuntimeError(message)
        elif self._reads:
            output[: int(num_local_tokens)] = 0
        compute()
        return output


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def graph(captured: FakeGraph) -> Iterator[None]:
        FakeGraph.capturing = captured
        try:
            yield
        finally:
            FakeGraph.capturing = None

    stream = SimpleNamespace(wait_stream=lambda _: None)
    for name, fake in (
        ("Stream", lambda: stream),
        ("current_stream", lambda: stream),
        ("stream", lambda _: nullcontext()),
        ("CUDAGraph", FakeGraph),
        ("graph", graph),
    ):
        monkeypatch.setattr(torch.cuda, name, fake)


class Buffers:
    """The buffers of calls, and what they should give."""

    def __init__(self, device: str) -> None:
        self.hidden = torch.randn(ROWS, COLUMNS, device=device)
        self.weights = torch.rand(ROWS, 2, device=device)
        self.live = torch.tensor([5], dtype=torch.int32, device=device)

    def call(self, experts: GraphedExperts, rows: int = ROWS) -> Tensor:
        nothing = self.hidden.new_empty(0)
        return experts(
            self.hidden[:rows],
            nothing,
            nothing,
            self.weights[:rows],
            nothing,
            expert_mask=nothing,
            num_local_tokens=self.live,
            a1_scale=None,
            dtype=torch.float32,
        )

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
def test_a_call_is_captured_once_with_no_live_row_and_replayed_with_others() -> None:
    assert replays_are_right("cpu").calls == [5, 0, 0, 0]


@pytest.mark.usefixtures("fake_cuda")
def test_what_cannot_be_captured_is_refused_with_the_reason() -> None:
    with pytest.raises(Unsupported, match=REFUSED) as caught:
        Buffers("cpu").call(GraphedExperts(LiveRows(reads=True)))
    assert "not permitted when stream is capturing" in str(caught.value)
    assert "run without --graph" in str(caught.value)
    assert caught.value.exit_code == 77


@pytest.mark.usefixtures("fake_cuda")
def test_capture_is_proved_before_a_row_moves() -> None:
    nothing = torch.empty(0)
    weights = ExpertWeights(nothing, nothing, nothing)
    like = TokenBatch(torch.ones(2, COLUMNS), None, torch.ones(2, 2), torch.ones(2, 2, dtype=torch.int32))
    inner = LiveRows()
    prove_capture(inner, weights, like, ROWS)
    assert inner.calls == [0, 0]
    with pytest.raises(Unsupported, match=REFUSED):
        prove_capture(LiveRows(reads=True), weights, like, ROWS)


@pytest.mark.gpu
def test_experts_of_torch_alone_replay_on_a_device() -> None:
    replays_are_right("cuda")


@pytest.mark.gpu
def test_a_host_read_cannot_be_captured_on_a_device() -> None:
    buffers = Buffers("cuda")
    with pytest.raises(Unsupported, match=REFUSED):
        buffers.call(GraphedExperts(LiveRows(reads=True)))
    assert torch.equal(buffers.call(GraphedExperts(LiveRows())), buffers.expected())
