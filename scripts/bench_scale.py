"""What a rank costs rank 0, at several numbers of ranks on this machine: start-up, bytes received, time and memory.

Every rank holds a tiny case, so that what grows is the ranks and not their work. Bytes are those that the kernel has
counted on rank 0's own sockets (TCP_INFO), over a whole case and within gathering alone. Exit 1 where the bytes per
rank grow with the ranks by more than a fifth beyond the row counts, which are 8 bytes for each pair of ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import struct
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from distbench import rank as rank_module
from distbench.breadcrumbs import Breadcrumbs
from distbench.case import Case
from distbench.process import peak_bytes
from distbench.resolve import Layer, resolve_case
from distbench.session import Session
from distbench.supervisor import preload_ranks

GROWTH_BOUND = 1.2
_COUNT_BYTES = 8
_TIMEOUT_S = 300.0
_ARGUMENTS_AND_NAME = 3
# struct tcp_info of Linux: tcpi_bytes_received is the second of two 64-bit counters at byte 120.
_BYTES_RECEIVED_AT = 128


def received_bytes() -> int:
    """Return the bytes that this process's open TCP sockets have received."""
    total = 0
    for name in os.listdir("/proc/self/fd"):
        try:
            with socket.socket(fileno=os.dup(int(name))) as one:
                if one.type is socket.SOCK_STREAM and one.family in (socket.AF_INET, socket.AF_INET6):
                    info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    total += struct.unpack_from("<Q", info, _BYTES_RECEIVED_AT)[0]
        except OSError:  # no socket, or one that only listens
            continue
    return total


class Gathering:
    """Stands in for `gather` and adds up what rank 0 receives in it, and for how long."""

    def __init__(self) -> None:
        self._gather = rank_module.gather
        self.received = 0
        self.seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        """Gather, and measure it. All ranks are there when it begins."""
        dist.barrier()
        before, started = received_bytes(), time.perf_counter()
        gathered = self._gather(*arguments)
        self.received, self.seconds = received_bytes() - before, time.perf_counter() - started
        return gathered


def work(case: Case, repeats: int, started: float, out: str) -> None:
    """Run as a rank: the case `repeats` times; rank 0 writes what it has measured."""
    session = Session(Breadcrumbs(None), _TIMEOUT_S)
    dist.barrier()
    up = time.time() - started
    rank_module.gather = measured = Gathering()  # type: ignore[assignment]
    session.enter(case.ep_size)
    rows = []
    for _ in range(repeats):
        dist.barrier()
        before, wall, cpu = received_bytes(), time.perf_counter(), time.process_time()
        outcome = rank_module.run_case(session, case)
        rows.append(
            {
                "wall_s": time.perf_counter() - wall,
                "cpu_s": time.process_time() - cpu,
                "received": received_bytes() - before,
                "gather_received": measured.received,
                "gather_s": measured.seconds,
            }
        )
        if outcome is not None and outcome.judgement.verdict.value != "PASS":
            message = f"{outcome.judgement.verdict.value}: {outcome.judgement.reasons}"
            raise RuntimeError(message)
    if session.rank == 0:
        medians = {key: statistics.median(row[key] for row in rows[1:]) for key in rows[0]}
        files = len(os.listdir("/proc/self/fd"))
        Path(out).write_text(json.dumps(medians | {"start_s": up, "peak": peak_bytes(), "files": files}))
    session.close()


def measure(ranks: int, repeats: int) -> dict[str, float]:
    """Return rank 0's medians at a number of ranks."""
    values = {"model": "tiny", "num_experts": 2 * ranks, "max_dispatch_tokens_per_rank": 4, "tokens": 2}
    case = resolve_case([Layer("bench", {key: str(value) for key, value in values.items()})], ranks).case
    with tempfile.TemporaryDirectory() as folder:
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            run_id="bench-scale",
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            start_method="forkserver",
            max_restarts=0,
            logs_specs=DefaultLogsSpecs(log_dir=folder),
        )
        out = str(Path(folder) / "rank0.json")
        elastic_launch(config, work)(case, repeats, time.time(), out)
        found: dict[str, float] = json.loads(Path(out).read_text())
    return found


def main() -> int:
    """Measure, print a table, and compare the bytes per rank of the most ranks with those of the fewest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="2,8,64", help="numbers of ranks (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="cases; the first is left out (default: %(default)s)")
    options = parser.parse_args()
    preload_ranks()
    print("ranks  start s  case s  cpu s  gather s  bytes/case  bytes/rank  gathered  gathered/rank  files  peak MiB")
    per_rank = []
    for ranks in map(int, options.ranks.split(",")):
        row = measure(ranks, options.repeats)
        others = ranks - 1
        per_rank.append(row["gather_received"] / others)
        print(
            f"{ranks:5d}  {row['start_s']:7.2f}  {row['wall_s']:6.3f}  {row['cpu_s']:5.3f}  {row['gather_s']:8.4f}  "
            f"{row['received']:10.0f}  {row['received'] / others:10.0f}  {row['gather_received']:8.0f}  "
            f"{per_rank[-1]:13.0f}  {row['files']:5.0f}  {row['peak'] / 2**20:8.0f}",
            flush=True,
        )
    grown = per_rank[-1] / per_rank[0]
    print(f"gathered bytes per rank grow by {grown:.2f} from the fewest ranks to the most; the bound is {GROWTH_BOUND}")
    return int(grown > GROWTH_BOUND)


if __name__ == "__main__":
    sys.exit(main())
