"""Host work of a dispatch and a combine on a device, as one JSON object. Run as a script, or see `measure`.

Launches and the exchange do nothing, so that what is left is the transport's own: torch's operations, launches and the
thread's time, in microseconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from distbench.transport.collective import row_kernels
from distbench.transport.collective.arrival import Geometry
from distbench.transport.collective.transport import CollectiveTransport
from distbench.transport.collective.triton_rows import TritonRows
from distbench.workload.batch import TokenBatch
from distbench.workload.routing import recv_counts

RANKS, TOKENS, HIDDEN, TOPK, EXPERTS = 4, 16, 7168, 8, 128
KERNELS = "move", "take_back", "add_rows"
CALLS = 600


class Kernel:
    """Fake of a compiled `triton.jit` function that keeps the arguments of launches past Triton's look-up."""

    def __init__(self, name: str, launched: list[tuple[str, list[Any]]]) -> None:
        self.arg_names = getattr(row_kernels, name).arg_names
        self._name, self._launched = name, launched

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def compile_and_run(*_: object, **__: object) -> Any:
            metadata, source = SimpleNamespace(num_ctas=2), SimpleNamespace(signature={})  # not to be packed
            return SimpleNamespace(run=self._run, function="f", packed_metadata="m", metadata=metadata, src=source)

        return compile_and_run

    def _run(self, *arguments: Any) -> None:
        self._launched.append((self._name, [*arguments[:3], *arguments[9:]]))


class Nothing:
    """`Exchange` of no rows."""

    name = "nothing"

    def start(self, *_: object) -> tuple[()]:
        """Start nothing."""
        return ()

    def run(self, *_: object) -> None:
        """Exchange nothing."""


class Operations(TorchDispatchMode):
    """Names of torch's operations."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: list[str] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(function))
        return function(*args, **(kwargs or {}))


class Scene:
    """A transport of rank 0 whose tensors count as those of a device, after a call, and its batch and expert rows."""

    def __init__(self, launched: list[tuple[str, list[Any]]], *, shuffled: bool) -> None:
        generator = torch.Generator().manual_seed(1)
        batches = [batch_of(generator) for _ in range(RANKS)]
        self.batch, self.launched = batches[0], launched
        counts = torch.stack([recv_counts(one.ids, EXPERTS // RANKS, RANKS) for one in batches])
        geometry = Geometry(0, RANKS, EXPERTS, RANKS * TOKENS, counts)
        self.transport = CollectiveTransport(Nothing(), geometry, self.batch, seed=3, shuffled=shuffled)
        self.mover = self.transport.mover = TritonRows(self.transport._traffic)  # noqa: SLF001 - as on a device
        self.expert_out = torch.zeros(RANKS * TOKENS, HIDDEN, dtype=torch.bfloat16)
        self.call()
        self.transport._device = torch.device("cuda")  # noqa: SLF001 - as above
        self.transport._arrivals._device = torch.device("cuda")  # noqa: SLF001 - orders are drawn, and repeat
        self.call()

    def call(self) -> Tensor:
        """Make a dispatch and a combine."""
        self.transport.dispatch(self.batch)
        return self.transport.combine(self.expert_out, self.batch.ids)


def batch_of(generator: torch.Generator) -> TokenBatch:
    return TokenBatch(
        torch.randn(TOKENS, HIDDEN, generator=generator).bfloat16(),
        None,
        torch.rand(TOKENS, TOPK, generator=generator),
        torch.rand(TOKENS, EXPERTS, generator=generator).argsort(1)[:, :TOPK].int(),
    )


@contextmanager
def scene(*, shuffled: bool = True) -> Iterator[Scene]:
    """A scene whose launches are kept in a list."""
    launched: list[tuple[str, list[Any]]] = []
    with ExitStack() as patched:
        patched.enter_context(torch.inference_mode())
        patched.enter_context(patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, create=True))  # noqa: SLF001
        for name in KERNELS:
            patched.enter_context(patch.object(row_kernels, name, Kernel(name, launched)))
        yield Scene(launched, shuffled=shuffled)


def measure(calls: int) -> dict[str, Any]:
    """Operations and launches of a dispatch and a combine, and the medians of their times over `calls`."""
    with scene() as one:
        transport, found = one.transport, {}
        steps: dict[str, Callable[[], object]] = {
            "dispatch": lambda: transport.dispatch(one.batch),
            "combine": lambda: transport.combine(one.expert_out, one.batch.ids),
        }
        for name, step in steps.items():
            one.launched.clear()
            with Operations() as operations:
                step()
            found[name] = {"operations": operations.names, "launches": [kernel for kernel, _ in one.launched]}
        times: dict[str, list[float]] = {name: [] for name in steps}
        for _ in range(calls):
            for name, step in steps.items():
                begin = time.thread_time()
                step()
                times[name].append((time.thread_time() - begin) * 1e6)
        for name, samples in times.items():
            found[name]["us"] = round(statistics.median(samples), 1) if samples else None
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(measure(CALLS), sys.stdout)
