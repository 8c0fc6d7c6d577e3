"""Dispatch and combine of the collective transport against a bare all_to_all_single of the same bytes.

Start it under torchrun, a rank for each device: torchrun --nproc-per-node 2 scripts/bench_transport.py. On a device the
bound is held against the device's time, by events between calls that are all launched beforehand, as they are where a
layer runs behind others; the time with launches, from an idle device to an idle device, stands beside it. On the CPU
the figures are those of gloo on one machine, and only check the harness.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist

from distbench.breadcrumbs import Breadcrumbs
from distbench.case import Case
from distbench.rank import workload_for
from distbench.resolve import Layer, resolve_case
from distbench.session import Session
from distbench.transport import make_transport
from distbench.workload.routing import recv_counts

BOUND = 1.5
WARMUP, ITERATIONS = 10, 100
STEPS = ("dispatch", "combine")
BUSY_CYCLES = 4_000_000  # some 2 ms
TIMEOUT_S = 120.0

Work = Callable[[Callable[[], None]], None]


def main() -> int:
    """Measure, print on rank 0, and return 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", default="deepseek-v3")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    options = parser.parse_args()
    session = Session(Breadcrumbs(None), TIMEOUT_S, accelerated=options.device != "cpu")
    session.use(options.device)
    with torch.inference_mode():
        passed = [_measure(session, _case(options.model, tokens, session.world_size)) for tokens in options.tokens]
    session.close()
    return 0 if all(passed) else 1


def _case(model: str, tokens: int, ep_size: int) -> Case:
    layer = Layer("bench", {"model": model, "tokens": tokens, "max_dispatch_tokens_per_rank": tokens})
    return resolve_case([layer], ep_size).case


def _measure(session: Session, case: Case) -> bool:
    batch = workload_for(case, session.device).tokens(session.rank)
    sent = recv_counts(batch.ids, case.experts_per_rank, case.ep_size).cpu()
    counts = session.agree("0" * 64, sent.new_zeros(1), sent)
    transport = make_transport(session, case, counts, batch)
    output = transport.dispatch(batch).hidden.clone()
    transport.combine(output, batch.ids)

    def both(mark: Callable[[], None]) -> None:
        mark()
        transport.dispatch(batch)
        mark()
        transport.combine(output, batch.ids)
        mark()

    bare = [
        _bare(session, counts, transport.facts["row_bytes"]),
        _bare(session, counts.t(), case.hidden_size * 2),
    ]
    clocks: list[type[Clock]] = [HostClock] if session.device.type == "cpu" else [DeviceClock, HostClock]
    passed = True
    for clock in clocks:
        ours = [statistics.median(lap) for lap in zip(*_repeat(session, both, clock), strict=True)]
        theirs = [statistics.median(lap[0] for lap in _repeat(session, one, clock)) for one in bare]
        bound = BOUND if clock is clocks[0] else math.inf
        passed &= max(mine / other for mine, other in zip(ours, theirs, strict=True)) <= bound
        if session.rank == 0:
            for step, mine, other in zip(STEPS, ours, theirs, strict=True):
                print(f"{session.device} x{session.world_size}, {case.tokens[0]} tokens a rank, "
                      f"{step}: {_verdict(mine, other, bound)}, {clock.basis}")  # fmt: skip
    return passed


def _verdict(ours: float, theirs: float, bound: float) -> str:
    ratio = ours / theirs
    figures = f"{ours:.1f} us, bare {theirs:.1f} us, ratio {ratio:.2f}"
    return figures if bound == math.inf else f"{figures}, at most {bound}: {'ok' if ratio <= bound else 'MISSED'}"


def _bare(session: Session, counts: torch.Tensor, row: int) -> Work:
    sent, received = counts[session.rank].tolist(), counts[:, session.rank].tolist()
    outgoing = torch.zeros(sum(sent), row, dtype=torch.uint8, device=session.device)
    incoming = outgoing.new_empty(sum(received), row)

    def exchange(mark: Callable[[], None]) -> None:
        mark()
        dist.all_to_all_single(incoming, outgoing, received, sent, group=session.group)
        mark()

    return exchange


class Clock(Protocol):
    """Takes moments of one iteration."""

    basis: str

    def __init__(self, session: Session) -> None:
        """Begin together with the other ranks."""

    def mark(self) -> None:
        """Take a moment."""

    def laps(self) -> list[float]:
        """Return the microseconds between the moments."""


class HostClock:
    """The host's time, the device idle at each moment."""

    basis = "host time"

    def __init__(self, session: Session) -> None:
        self._on_device = session.device.type != "cpu"
        self._moments: list[float] = []
        dist.barrier(group=session.group)

    def mark(self) -> None:
        """See `Clock.mark`."""
        if self._on_device:
            torch.cuda.synchronize()
        self._moments.append(time.perf_counter() * 1e6)

    def laps(self) -> list[float]:
        """See `Clock.laps`."""
        return [after - before for before, after in itertools.pairwise(self._moments)]


class DeviceClock:
    """The device's time; it is kept busy until all calls are launched."""

    basis = "device time"

    def __init__(self, session: Session) -> None:
        self._events: list[torch.cuda.Event] = []
        dist.all_reduce(torch.zeros(1, device=session.device), group=session.group)
        torch.cuda._sleep(BUSY_CYCLES)  # noqa: SLF001 - torch has no other kernel that takes its time

    def mark(self) -> None:
        """See `Clock.mark`."""
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        self._events.append(event)

    def laps(self) -> list[float]:
        """See `Clock.laps`."""
        self._events[-1].synchronize()
        return [before.elapsed_time(after) * 1000 for before, after in itertools.pairwise(self._events)]


def _repeat(session: Session, work: Work, make: type[Clock]) -> list[list[float]]:
    """Return the slowest rank's microseconds of each part of each iteration."""
    table = []
    for iteration in range(WARMUP + ITERATIONS):
        clock = make(session)
        work(clock.mark)
        laps = clock.laps()
        if iteration >= WARMUP:
            table.append(laps)
    slowest = torch.tensor(table, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=session.group)
    rows: list[list[float]] = slowest.tolist()
    return rows


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
