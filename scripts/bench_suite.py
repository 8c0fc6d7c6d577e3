"""Marginal cost of a case in a suite, compared with its cost in its own launch.

A suite of tiny cases runs in one launch, and a suite of one case in another: their difference is the marginal cost of
a case. Compared with it: ten cases in a launch each, extrapolated, and the time of a gloo exchange between as many
ranks, before and after. The bounds were set on two cores, where eight ranks take 4.6 ms for the exchange.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench import Check, finish, progress, start

SUITE_BOUND_S = 60.0
CASE_BOUND_MS = 60.0
SEPARATE_LAUNCHES = 10
EXCHANGES = 200
EXCHANGE = f"""
import time
import torch
import torch.distributed as dist

torch.set_num_threads(1)
dist.init_process_group("gloo")
rows = torch.zeros(dist.get_world_size() * 8, 640, dtype=torch.uint8)
for count in ({EXCHANGES // 10}, {EXCHANGES}):
    dist.barrier()
    began = time.perf_counter()
    for _ in range(count):
        dist.all_to_all_single(torch.empty_like(rows), rows)
if dist.get_rank() == 0:
    print((time.perf_counter() - began) / count * 1000)
dist.destroy_process_group()
"""
SUITE = """
[defaults]
model = "tiny"
max_dispatch_tokens_per_rank = 64
[axes]
seed = {seeds}
"""


def main() -> int:
    """Measure, print, and return 1 if a bound is missed."""
    options = _parse()
    with tempfile.TemporaryDirectory(prefix="distbench-bench-") as name:
        folder = Path(name)
        run = [sys.executable, "-m", "distbench", "run", f"--nproc={options.nproc}", "--model=tiny", f"--out={folder}"]
        separate = [_timed(f"launch {turn + 1} of {SEPARATE_LAUNCHES}", run) for turn in range(SEPARATE_LAUNCHES)]
        before = _exchange_ms(folder, options.nproc)
        single = _suite_seconds(folder, 1, options.nproc)
        whole = _suite_seconds(folder, options.cases, options.nproc)
        after = _exchange_ms(folder, options.nproc)
    launch = statistics.median(separate)
    print(f"one launch per case: median {launch:.2f} s of {SEPARATE_LAUNCHES}, {options.cases} cases would take "
          f"{launch * options.cases:.0f} s")  # fmt: skip
    print(f"one all-to-all of {options.nproc} ranks by gloo: {before:.2f} ms before the suites, {after:.2f} ms after")
    marginal = (whole - single) / max(options.cases - 1, 1) * 1000
    checks = [
        Check(f"{options.cases} cases in one launch", whole, SUITE_BOUND_S, " s"),
        Check("marginal cost of a case", marginal, CASE_BOUND_MS, " ms"),
    ]
    print("\n".join(map(str, checks)))
    return 0 if all(check.passed for check in checks) else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=8, metavar="N", help="ranks (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=500, metavar="N", help="cases (default: %(default)s)")
    return parser.parse_args()


def _exchange_ms(folder: Path, nproc: int) -> float:
    program = folder / "exchange.py"
    program.write_text(EXCHANGE)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}", str(program)]
    progress(f"{EXCHANGES} all-to-alls by gloo")
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _suite_seconds(folder: Path, num_cases: int, nproc: int) -> float:
    path = folder / f"suite-{num_cases}.toml"
    path.write_text(SUITE.format(seeds=list(range(num_cases))))
    out = f"--out={folder / str(num_cases)}"
    command = [sys.executable, "-m", "distbench", "suite", str(path), f"--nproc={nproc}", out, "--quiet"]
    return _timed(f"suite of {num_cases}", command)


def _timed(text: str, command: list[str]) -> float:
    progress(text)
    started = time.monotonic()
    finish(command, start(command))
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
