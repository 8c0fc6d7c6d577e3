"""Marginal cost of a case in a suite, compared with its cost in its own launch.

A suite of tiny cases runs in one launch, and a suite of one case in another: their difference is the marginal cost of
a case, with exact inputs alone and with both kinds, each with its own bound. Compared with it: ten cases in a launch
each, extrapolated, and the time of a gloo exchange between as many ranks, before and after. The bounds were set on two
cores, where eight ranks take 4.6 ms for the exchange.
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

CASE_BOUNDS_MS = {"exact": 60.0, "both": 120.0}
SUITE_BOUNDS_S = {"exact": 60.0, "both": 120.0}
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
numerics = "{numerics}"
[axes]
seed = {seeds}
"""


def main() -> int:
    """Measure, print, and return 1 if a bound is missed."""
    options = _parse()
    with tempfile.TemporaryDirectory(prefix="distbench-bench-") as name:
        folder = Path(name)
        run = [sys.executable, "-m", "distbench", "run", f"--nproc={options.nproc}", "--model=tiny", f"--out={folder}"]
        separate = [_measured(f"launch {turn + 1} of {options.launches}", run) for turn in range(options.launches)]
        before = _exchange_ms(folder, options.nproc)
        checks = [check for numerics in options.numerics for check in _suite_checks(folder, numerics, options)]
        after = _exchange_ms(folder, options.nproc)
    if separate:
        launch = statistics.median(separate)
        print(f"one launch per case: median {launch:.2f} s of {len(separate)}, {options.cases} cases would take "
              f"{launch * options.cases:.0f} s")  # fmt: skip
    print(f"one all-to-all of {options.nproc} ranks by gloo: {before:.2f} ms before the suites, {after:.2f} ms after")
    print("\n".join(map(str, checks)))
    return 0 if all(check.passed for check in checks) else 1


def _suite_checks(folder: Path, numerics: str, options: argparse.Namespace) -> list[Check]:
    """Run a suite of one case and one of all; return their costs with the bounds."""
    single = _suite(folder, numerics, 1, options.nproc)
    whole = _suite(folder, numerics, options.cases, options.nproc)
    others = max(options.cases - 1, 1)
    bound = CASE_BOUNDS_MS[numerics]
    return [
        Check(f"{options.cases} cases in one launch, {numerics}", whole, SUITE_BOUNDS_S[numerics], " s"),
        Check(f"marginal cost of a case, {numerics}", (whole - single) / others * 1000, bound, " ms"),
    ]


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=8, metavar="N", help="ranks (default: %(default)s)")
    parser.add_argument("--cases", type=int, default=500, metavar="N", help="cases (default: %(default)s)")
    parser.add_argument(
        "--numerics",
        nargs="+",
        choices=CASE_BOUNDS_MS,
        default=list(CASE_BOUNDS_MS),
        help="kinds of inputs (default: exact both)",
    )
    parser.add_argument(
        "--launches", type=int, default=10, metavar="N", help="launches of one case each (default: %(default)s)"
    )
    return parser.parse_args()


def _exchange_ms(folder: Path, nproc: int) -> float:
    program = folder / "exchange.py"
    program.write_text(EXCHANGE)
    command = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={nproc}", str(program)]
    progress(f"{EXCHANGES} all-to-alls by gloo")
    return float(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _suite(folder: Path, numerics: str, num_cases: int, nproc: int) -> float:
    path = folder / f"suite-{numerics}-{num_cases}.toml"
    path.write_text(SUITE.format(numerics=numerics, seeds=list(range(num_cases))))
    out = f"--out={folder / f'{numerics}-{num_cases}'}"
    command = [sys.executable, "-m", "distbench", "suite", str(path), f"--nproc={nproc}", out, "--quiet"]
    return _measured(f"suite of {num_cases}, {numerics}", command)


def _measured(text: str, command: list[str]) -> float:
    progress(text)
    started = time.monotonic()
    finish(command, start(command))
    return time.monotonic() - started


if __name__ == "__main__":
    sys.exit(main())
