"""Dispatch and combine of the collective transport against a bare all_to_all_single of the same bytes.

Start it under torchrun, a rank for each device: torchrun --nproc-per-node 2 scripts/bench_transport.py. On the CPU the
figures are those of gloo on one machine, and only check the harness.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable

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
TIMEOUT_S = 120.0


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
    times = {
        "bare dispatch": _bare(session, counts, transport.facts["row_bytes"]),
        "bare combine": _bare(session, counts.t(), case.hidden_size * 2),
    }

    def both(marks: list[float]) -> None:
        marks.append(_now(session))
        transport.dispatch(batch)
        marks.append(_now(session))
        transport.combine(output, batch.ids)
        marks.append(_now(session))

    laps = _repeat(session, both)
    times |= {"dispatch": [one[0] for one in laps], "combine": [one[1] for one in laps]}
    median = {name: statistics.median(samples) for name, samples in times.items()}
    ratios = {name: median[name] / median[f"bare {name}"] for name in ("dispatch", "combine")}
    if session.rank == 0:
        for name, ratio in ratios.items():
            print(
                f"{session.device} x{session.world_size}, {case.tokens[0]} tokens a rank, {name}: "
                f"{median[name]:.1f} us, bare {median[f'bare {name}']:.1f} us, ratio {ratio:.2f}, at most {BOUND}: "
                f"{'ok' if ratio <= BOUND else 'MISSED'}"
            )
    return all(ratio <= BOUND for ratio in ratios.values())


def _bare(session: Session, counts: torch.Tensor, row: int) -> list[float]:
    sent, received = counts[session.rank].tolist(), counts[:, session.rank].tolist()
    outgoing = torch.zeros(sum(sent), row, dtype=torch.uint8, device=session.device)
    incoming = outgoing.new_empty(sum(received), row)

    def exchange(marks: list[float]) -> None:
        marks.append(_now(session))
        dist.all_to_all_single(incoming, outgoing, received, sent, group=session.group)
        marks.append(_now(session))

    return [laps[0] for laps in _repeat(session, exchange)]


def _now(session: Session) -> float:
    if session.device.type != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() * 1e6


def _repeat(session: Session, work: Callable[[list[float]], None]) -> list[list[float]]:
    """Return the slowest rank's time of each part of each iteration, in microseconds; host time, device done."""
    table = []
    for iteration in range(WARMUP + ITERATIONS):
        dist.barrier(group=session.group) if session.device.type == "cpu" else torch.cuda.synchronize()
        marks: list[float] = []
        work(marks)
        if iteration >= WARMUP:
            table.append([after - before for before, after in itertools.pairwise(marks)])
    slowest = torch.tensor(table, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX, group=session.group)
    rows: list[list[float]] = slowest.tolist()
    return rows


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
