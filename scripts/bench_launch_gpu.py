"""Wall time of a command on GPUs of one host, compared with a bare torchrun of as many ranks with one NCCL all-reduce.

The two commands take turns after an untimed turn in which kernels are compiled. The bound is on the ratio
of the medians.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from bench import Check, measure_times, summary

MANY_RANKS = 8
BOUND, BOUND_OF_MANY = 2.5, 1.5
LOCAL_EXPERTS, CAPACITY = 32, 32768
LAYER = ("--device=cuda", "--model=deepseek-v3", "--tokens=512", "--experts=triton")
BARE = """
import os

import torch
import torch.distributed as dist

torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
dist.init_process_group("nccl")
dist.all_reduce(torch.ones(1, device="cuda"))
torch.cuda.synchronize()
dist.destroy_process_group()
"""


def main() -> int:
    """Measure, print, and return 1 if the bound is missed."""
    options = _parse()
    found, ranks = torch.cuda.device_count(), options.nproc
    if found < ranks:
        print(
            f"bench: torch sees {found} GPUs; {ranks} ranks take one each, run it on a node with as many",
            file=sys.stderr,
        )
        return 77
    with tempfile.TemporaryDirectory(prefix="distbench-bench-") as folder:
        seconds = measure_times(_commands(Path(folder), ranks), options.runs)
    for name, values in seconds.items():
        print(summary(name, values))
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    bound = BOUND_OF_MANY if ranks >= MANY_RANKS else BOUND
    check = Check(f"{torch.cuda.get_device_name()} x{ranks}, run / bare", medians["run"] / medians["bare"], bound)
    print(check)
    if options.json:
        options.json.write_text(
            json.dumps({"device": torch.cuda.get_device_name(), "seconds": seconds}, indent=1) + "\n"
        )
    return 0 if check.passed else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=int, default=2, metavar="N", help="ranks (default: %(default)s)")
    parser.add_argument("--runs", type=int, default=3, metavar="N", help="runs of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the samples here")
    return parser.parse_args()


def _commands(folder: Path, ranks: int) -> dict[str, list[str]]:
    script = folder / "bare.py"
    script.write_text(BARE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    sizes = [f"--num-experts={LOCAL_EXPERTS * ranks}", f"--max-dispatch-tokens-per-rank={CAPACITY // ranks}"]
    run = [sys.executable, "-m", "distbench", "run", f"--nproc={ranks}", f"--out={folder / 'out'}", *LAYER, *sizes]
    return {"bare": [*torchrun, str(script)], "run": run}


if __name__ == "__main__":
    sys.exit(main())
