"""Cost per rank at several numbers of ranks on this machine: start-up, time, bytes to rank 0, memory, descriptors.

Every rank holds a tiny case, so only the number of ranks grows, not their work. Ranks share no memory, as if each were
on another host. Bytes are the kernel's socket counters (TCP_INFO): received by rank 0 over a whole case and within
gathering alone, sent by rank 0, and sent by all ranks. Exit 1 where the gathered bytes per rank grow by
more than a fifth from the fewest ranks to the most.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import socket
import statistics
import struct
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist

from distbench.case.resolve import Layer, resolve_case
from distbench.case.spec import Case
from distbench.distributed.heartbeat import Heartbeat
from distbench.distributed.session import Session
from distbench.errors import InvalidCase, Verdict
from distbench.launcher.agent import preload_ranks
from distbench.pipeline import run_case as rank_module
from distbench.utils.variables import SHARED_MEMORY
from distbench.verify.gather import gather

GROWTH_BOUND = 1.2
MOST_OF_AN_AGENT = 64
_TIMEOUT_S = 900.0
_SAMPLING_S = 0.2
# struct tcp_info of Linux: two 64-bit counters, tcpi_bytes_acked and tcpi_bytes_received.
_BYTES_SENT_AT, _BYTES_RECEIVED_AT = 120, 128
_COLUMNS = (
    ("ranks", "{:5d}"),
    ("start s", "{:7.2f}"),
    ("case s", "{:6.3f}"),
    ("cpu ms/rank", "{:11.1f}"),
    ("gather s", "{:8.4f}"),
    ("its cpu ms", "{:10.1f}"),
    ("bytes/rank", "{:10.0f}"),
    ("gathered/rank", "{:13.0f}"),
    ("sent kB", "{:8.1f}"),
    ("by all MB", "{:9.2f}"),
    ("MiB/rank", "{:8.1f}"),
    ("files of a rank", "{:15d}"),
    ("of the agents", "{:13d}"),
    ("store KiB/rank", "{:14.1f}"),
)


class Parent(msgspec.Struct):
    """Maximum of open descriptors and sent bytes of the agents' process, which holds the store."""

    files: int = 0
    sent: int = 0


class Figures(msgspec.Struct):
    """Figures of one number of ranks. Times are medians over cases, processor time and memory means over ranks.

    `received` and `gathered`: bytes that rank 0 received in a case and in gathering. `sent`: bytes that it sent in a
    case, `all_sent` those of all ranks. `gather_cpu_s`: processor time of rank 0 in gathering. Memory excludes pages
    shared with other processes, such as the interpreter's and torch's.
    """

    start_s: float
    case_s: float
    gather_s: float
    gather_cpu_s: float
    received: float
    gathered: float
    sent: float
    all_sent: float
    cpu_s: float
    memory_bytes: float
    rank_files: int
    parent: Parent | None = None


def counted_bytes(counter_at: int) -> int:
    """Sum of a TCP_INFO counter over this process's open sockets."""
    total = 0
    for name in _files():
        with contextlib.suppress(OSError):  # closed meanwhile, or no TCP socket
            copy = os.dup(int(name))
            try:
                total += _counter(copy, counter_at)
            finally:
                os.close(copy)
    return total


def _files() -> list[str]:
    return [path.name for path in Path("/proc/self/fd").iterdir()]


def _counter(descriptor: int, counter_at: int) -> int:
    one = socket.socket(fileno=descriptor)
    try:
        if one.type is not socket.SOCK_STREAM or one.family not in (socket.AF_INET, socket.AF_INET6):
            return 0
        info = one.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
        counted: int = struct.unpack_from("<Q", info, counter_at)[0]
        return counted
    finally:
        one.detach()


class Gathering:
    """Replacement of `gather` that records received bytes, wall time and processor time on rank 0."""

    def __init__(self) -> None:
        self.received = 0
        self.seconds = self.cpu_seconds = 0.0

    def __call__(self, *arguments: Any) -> Any:
        """Gather, and measure from the moment at which all ranks have arrived."""
        dist.barrier()
        before, started, cpu = counted_bytes(_BYTES_RECEIVED_AT), time.perf_counter(), time.process_time()
        gathered = gather(*arguments)
        self.seconds, self.cpu_seconds = time.perf_counter() - started, time.process_time() - cpu
        self.received = counted_bytes(_BYTES_RECEIVED_AT) - before
        return gathered


def work(case: Case, repeats: int, started: float, out: str) -> None:
    """Run as a rank: the case once untimed and `repeats` times; rank 0 writes the measurements."""
    session = Session(Heartbeat(None), _TIMEOUT_S, os.environ | {SHARED_MEMORY: "0"})
    dist.barrier()
    start_s = time.time() - started
    vars(rank_module)["gather"] = measured = Gathering()
    session.enter(case.ep_size)
    run(session, case)
    rows = [_measured(session, case, measured) for _ in range(repeats)]
    case_s, gather_s, gather_cpu_s, received, gathered, sent, cpu_s = map(statistics.median, zip(*rows, strict=True))
    sums = torch.tensor([sent, cpu_s, _own_bytes()], dtype=torch.float64)
    dist.all_reduce(sums)
    files = torch.tensor([len(_files())])
    dist.all_reduce(files, dist.ReduceOp.MAX)
    if session.rank == 0:
        all_sent, *sums_of_ranks = sums.tolist()
        cpu_s, memory_bytes = (one / session.world_size for one in sums_of_ranks)
        times = (start_s, case_s, gather_s, gather_cpu_s)
        figures = Figures(*times, received, gathered, sent, all_sent, cpu_s, memory_bytes, int(files))
        Path(out).write_bytes(msgspec.json.encode(figures))
    session.close()


def _measured(session: Session, case: Case, gathering: Gathering) -> tuple[float, ...]:
    dist.barrier()
    received, sent = _counted()
    wall, cpu = time.perf_counter(), time.process_time()
    run(session, case)
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    received, sent = (after - before for after, before in zip(_counted(), (received, sent), strict=True))
    return wall, gathering.seconds, gathering.cpu_seconds, received, gathering.received, sent, cpu


def _counted() -> tuple[int, int]:
    return counted_bytes(_BYTES_RECEIVED_AT), counted_bytes(_BYTES_SENT_AT)


def run(session: Session, case: Case) -> None:
    """Run the case; it must pass."""
    outcome = rank_module.run_case(session, case)
    if outcome is not None and outcome.judgement.verdict is not Verdict.PASS:
        message = f"{outcome.judgement.verdict.value}: {outcome.judgement.reasons}"
        raise RuntimeError(message)


def _own_bytes() -> int:
    """Memory that this process shares with no other, bytes."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_")) * 1024


@contextlib.contextmanager
def watched() -> Iterator[Parent]:
    """Yield the maxima of this process during the block."""
    parent, over = Parent(), threading.Event()

    def look() -> None:
        while not over.wait(_SAMPLING_S):
            parent.files = max(parent.files, len(_files()))
            parent.sent = max(parent.sent, counted_bytes(_BYTES_SENT_AT))

    watching = threading.Thread(target=look)
    watching.start()
    try:
        yield parent
    finally:
        over.set()
        watching.join()


def measure(ranks: int, repeats: int) -> Figures:
    """Figures at a number of ranks, spread over as many agents as needed."""
    values = {"model": "tiny", "num_experts": 2 * ranks, "max_dispatch_tokens_per_rank": 4, "tokens": 2}
    case = resolve_case([Layer("bench", values)], ranks).case
    agents = -(-ranks // MOST_OF_AN_AGENT)
    if ranks % agents:
        message = f"--ranks {ranks}: not divisible by the {agents} agents that it takes"
        raise InvalidCase(message)
    port, started = _free_port(), time.time()
    with tempfile.TemporaryDirectory() as folder, watched() as parent:
        out = Path(folder) / "figures.json"

        def launch(node: int) -> None:
            # Imported here: ranks import this file, and each would hold these modules.
            from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs  # noqa: PLC0415
            from torch.distributed.launcher.api import LaunchConfig, elastic_launch  # noqa: PLC0415

            config = LaunchConfig(
                min_nodes=agents,
                max_nodes=agents,
                nproc_per_node=ranks // agents,
                run_id="bench-scale",
                rdzv_backend="static",
                rdzv_endpoint=f"127.0.0.1:{port}",
                rdzv_configs={"rank": node, "timeout": int(_TIMEOUT_S)},
                start_method="forkserver",
                max_restarts=0,
                logs_specs=DefaultLogsSpecs(log_dir=folder),
            )
            elastic_launch(config, work)(case, repeats, started, str(out))

        with ThreadPoolExecutor(agents) as pool:
            list(pool.map(launch, range(agents)))
        figures = msgspec.json.decode(out.read_bytes(), type=Figures)
    return msgspec.structs.replace(figures, parent=parent)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
        return port


def show(ranks: int, found: Figures) -> None:
    """Print one line of the table."""
    parent = found.parent or Parent()
    cells = (
        ranks,
        found.start_s,
        found.case_s,
        found.cpu_s * 1e3,
        found.gather_s,
        found.gather_cpu_s * 1e3,
        found.received / (ranks - 1),
        found.gathered / (ranks - 1),
        found.sent / 1e3,
        found.all_sent / 1e6,
        found.memory_bytes / 2**20,
        found.rank_files,
        parent.files,
        parent.sent / ranks / 2**10,
    )
    print("  ".join(form.format(cell) for (_, form), cell in zip(_COLUMNS, cells, strict=True)), flush=True)


def main() -> int:
    """Measure, print a table, and compare the gathered bytes per rank of the most ranks with those of the fewest."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", default="2,8,64", help="numbers of ranks, two or more each (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="cases after the first one (default: %(default)s)")
    options = parser.parse_args()
    preload_ranks()
    print("  ".join(name for name, _ in _COLUMNS), flush=True)
    gathered = []
    for ranks in sorted(map(int, options.ranks.split(","))):
        found = measure(ranks, options.repeats)
        show(ranks, found)
        gathered.append(found.gathered / (ranks - 1))
    grown = gathered[-1] / gathered[0]
    print(f"gathered bytes per rank grow by {grown:.2f} from the fewest ranks to the most; the bound is {GROWTH_BOUND}")
    return int(grown > GROWTH_BOUND)


if __name__ == "__main__":
    sys.exit(main())
