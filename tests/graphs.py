"""CUDA graphs emulated on the CPU: a replay repeats the captured calls, and the test sets the allocated bytes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

from distbench.experts.base import ExpertInput, Experts, ExpertWeights
from distbench.experts.selection.choice import KernelChoice


class FakeGraph:
    """A graph that replays by repeating the captured calls."""

    capturing: FakeGraph | None = None

    def __init__(self) -> None:
        self.work: list[Callable[[], object]] = []

    def replay(self) -> None:
        for one in self.work:
            one()


class FakeMemory:
    """Allocator counters that the test sets."""

    def __init__(self) -> None:
        self.allocated = self.peak = 0

    def take(self, count: int) -> None:
        self.allocated += count
        self.peak = max(self.peak, self.allocated)

    def reset(self) -> None:
        self.peak = self.allocated


@contextmanager
def fake_graphs(
    ended: Callable[[], object] = lambda: None, synchronized: Callable[[], object] = lambda: None
) -> Iterator[FakeMemory]:
    """Make torch.cuda capture on the CPU; `ended` runs after each capture, `synchronized` in each synchronize."""

    @contextmanager
    def graph(captured: FakeGraph) -> Iterator[None]:
        FakeGraph.capturing = captured
        try:
            yield
        finally:
            FakeGraph.capturing = None
            ended()

    memory = FakeMemory()
    stream = SimpleNamespace(wait_stream=lambda _: None)
    with patch.multiple(
        torch.cuda,
        Stream=lambda: stream,
        current_stream=lambda: stream,
        stream=lambda _: nullcontext(),
        CUDAGraph=FakeGraph,
        graph=graph,
        synchronize=synchronized,
        memory_allocated=lambda: memory.allocated,
        max_memory_allocated=lambda: memory.peak,
        reset_peak_memory_stats=memory.reset,
    ):
        yield memory


class Capturable(Experts):
    """Experts whose calls a `FakeGraph` repeats; `damage` gets the live rows of a replay and their results."""

    def __init__(self, inner: Experts, damage: Callable[[int, Tensor], object] | None) -> None:
        self._inner, self._damage = inner, damage

    def selection(self, rows: int) -> KernelChoice:
        return self._inner.selection(rows)

    def __call__(self, given: ExpertInput, weights: ExpertWeights) -> Tensor:
        output = self._inner(given, weights).clone()

        def again() -> None:
            output.copy_(self._inner(given, weights))
            if self._damage is not None:
                self._damage(int(given.num_local_tokens), output)

        if FakeGraph.capturing is not None:
            FakeGraph.capturing.work.append(again)
        return output
