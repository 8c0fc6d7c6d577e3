"""Dispatch and combine of a transport, collective unless named, against a bare all_to_all_single of the same bytes.

Start it under torchrun, a rank for each device: torchrun --nproc-per-node 2 scripts/bench_transport.py. The two
take turns, and each call is timed separately after an all_reduce. On a device the bound applies to the device's time,
by events around a call that is launched ahead, as a layer behind others is; the time with launches, from idle device
to idle device, is printed too. On the CPU collective uses shared memory and bare is gloo, which only tries the
harness: there is no bound; symmetric needs devices.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist

from distbench.case.resolve import Layer, resolve_case
from distbench.case.spec import Case
from distbench.distributed.heartbeat import Heartbeat
from distbench.distributed.session import Session
from distbench.pipeline.inputs import workload_for
from distbench.transport import make_transport
from distbench.workload.batch import TokenBatch
from distbench.workload.routing import recv_counts

BOUNDS = {"collective": 1.5, "symmetric": 1.0}
WARMUP, ITERATIONS = 10, 100
BUSY_CYCLES = 4_000_000  # about 2 ms
TIMEOUT_S = 120.0

Work = Callable[[], object]
Clock = Callable[[Session, Work], float]


class Step(NamedTuple):
    """A call of the transport and the bare collective that moves the same bytes."""

    name: str
    ours: Work
    bare: Work


def main() -> int:
    """Measure, print on rank 0, and return 1 if a bound is missed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--model", default="deepseek-v3")
    parser.add_argument("--transport", choices=BOUNDS, default="collective")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 4096])
    options = parser.parse_args()
    session = Session(Heartbeat(None), TIMEOUT_S, accelerated=options.device != "cpu")
    session.use(options.device)
    with torch.inference_mode():
        keys = {"model": options.model, "transport": options.transport}
        passed = [_measure(session, _case(keys, tokens, session.world_size)) for tokens in options.tokens]
    session.close()
    return 0 if all(passed) else 1


def _case(keys: dict[str, str], tokens: int, ep_size: int) -> Case:
    layer = Layer("bench", {**keys, "tokens": tokens, "max_dispatch_tokens_per_rank": tokens})
    return resolve_case([layer], ep_size).case


def _measure(session: Session, case: Case) -> bool:
    batch = workload_for(case, session.device).tokens(session.rank)
    sent = recv_counts(batch.ids, case.experts_per_rank, case.ep_size).cpu()
    counts = session.agree("0" * 64, sent.new_zeros(1), sent)
    transport = make_transport(session, case, counts, batch)
    output = batch.hidden.new_zeros(case.capacity, case.hidden_size, dtype=torch.bfloat16)
    transport.dispatch(batch)
    transport.combine(output, batch.ids)

    steps = [
        Step(
            "dispatch",
            partial(transport.dispatch, batch),
            _bare(session, counts, transport.facts.get("row_bytes") or _row_bytes(batch)),
        ),
        Step(
            "combine",
            partial(transport.combine, output, batch.ids),
            _bare(session, counts.t(), case.hidden_size * 2),
        ),
    ]
    clocks = CLOCKS if session.device.type != "cpu" else {"host time": host_us}
    passed = True
    for number, (basis, clock) in enumerate(clocks.items()):
        bound = math.inf if number or session.device.type == "cpu" else BOUNDS[case.transport]
        for step, (ours, bare) in zip(steps, _medians(session, steps, clock), strict=True):
            passed &= ours / bare <= bound
            if session.rank == 0:
                print(f"{session.device} x{session.world_size}, {case.transport}, {case.tokens[0]} tokens a rank, "
                      f"{step.name}: {_verdict(ours, bare, bound)}, {basis}")  # fmt: skip
    return passed


def _row_bytes(batch: TokenBatch) -> int:
    """Bytes that a row has to move: its fields, and the number of its token."""
    return sum(part.shape[1] * part.element_size() for part in batch if part is not None) + 4


def _verdict(ours: float, theirs: float, bound: float) -> str:
    ratio = ours / theirs
    figures = f"{ours:.1f} us, bare {theirs:.1f} us, ratio {ratio:.2f}"
    return figures if bound == math.inf else f"{figures}, at most {bound}: {'ok' if ratio <= bound else 'MISSED'}"


def _bare(session: Session, counts: torch.Tensor, row: int) -> Work:
    sent, received = counts[session.rank].tolist(), counts[:, session.rank].tolist()
    outgoing = torch.zeros(sum(sent), row, dtype=torch.uint8, device=session.device)
    incoming = outgoing.new_empty(sum(received), row)

    return partial(dist.all_to_all_single, incoming, outgoing, received, sent, group=session.group)


def device_us(session: Session, work: Work) -> float:
    """Device time of `work`; the device is kept busy until the whole call is launched.

    The wait is in clock cycles, and clocks differ between devices, so an all_reduce after the wait makes ranks start
    together.
    """
    aligner = torch.zeros(1, device=session.device)
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(BUSY_CYCLES)  # noqa: SLF001 - torch has no other kernel that takes its time
    dist.all_reduce(aligner, group=session.group)
    begin.record()
    work()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) * 1000


def host_us(session: Session, work: Work) -> float:
    """Host time of `work`, from an idle device to an idle device."""
    dist.barrier(group=session.group)
    _wait(session)
    begin = time.perf_counter()
    work()
    _wait(session)
    return (time.perf_counter() - begin) * 1e6


def _wait(session: Session) -> None:
    if session.device.type != "cpu":
        torch.cuda.synchronize()


CLOCKS: dict[str, Clock] = {"device time": device_us, "host time": host_us}


def _medians(session: Session, steps: list[Step], clock: Clock) -> list[tuple[float, float]]:
    """Medians over iterations of the slowest rank's microseconds, of each step: transport and bare."""
    table = [_iteration(session, steps, clock, number) for number in range(WARMUP + ITERATIONS)]
    slowest = torch.tensor(table[WARMUP:], dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=session.group)
    columns: list[list[float]] = slowest.t().tolist()
    medians = [statistics.median(column) for column in columns]
    return list(zip(medians[::2], medians[1::2], strict=True))


def _iteration(session: Session, steps: list[Step], clock: Clock, number: int) -> list[float]:
    """Time transport and bare of each step, bare first in every other iteration."""
    found = []
    for step in steps:
        if number % 2:
            bare = clock(session, step.bare)
            found += [clock(session, step.ours), bare]
        else:
            found += [clock(session, step.ours), clock(session, step.bare)]
    return found


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
