"""Wall time and memory of a run, compared with a bare torchrun that loads torch and does one all-reduce.

The three commands take turns, so that a busy machine slows all of them alike. Memory is sampled in a run of its own,
because reading it slows down the processes that are read.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

SAMPLE_SECONDS = 0.05
MEMORY_BOUND_BYTES = 8 << 30
RATIO_BOUNDS = {"default": 2.0, "tiny": 1.3}
BARE = """
import torch
import torch.distributed as dist

dist.init_process_group("gloo")
dist.all_reduce(torch.ones(1))
dist.destroy_process_group()
"""


class Memory(NamedTuple):
    """Bytes of all processes of a command at one moment; `pss` counts a page that n of them share as 1/n in each."""

    rss: int
    pss: int


class Check(NamedTuple):
    """A measured value and its bound."""

    text: str
    value: float
    bound: float
    unit: str = ""

    @property
    def passed(self) -> bool:
        """Whether the value is within the bound."""
        return self.value <= self.bound

    def __str__(self) -> str:
        """One line of the result."""
        verdict = "ok" if self.passed else "MISSED"
        return f"{self.text}: {self.value:.2f}{self.unit}, at most {self.bound:g}{self.unit}: {verdict}"


def main() -> int:
    """Measure, print, and return 1 if a bound is missed."""
    options = _parse()
    with tempfile.TemporaryDirectory(prefix="distbench-bench-") as folder:
        commands = _commands(options.nproc, Path(folder))
        progress("memory: distbench run")
        samples = sample_memory(commands["default"])
        seconds = measure_times(commands, options.runs)
    for name, values in seconds.items():
        print(summary(name, values))
    checks = _checks(seconds, samples)
    print("\n".join(map(str, checks)))
    if options.json:
        raw = {"nproc": options.nproc, "seconds": seconds, "memory_bytes": [one._asdict() for one in samples]}
        options.json.write_text(json.dumps(raw, indent=1) + "\n")
    return 0 if all(check.passed for check in checks) else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nproc", type=_positive, default=8, metavar="N", help="ranks (default: %(default)s)")
    parser.add_argument("--runs", type=_positive, default=3, metavar="N", help="runs of each (default: %(default)s)")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the samples here")
    return parser.parse_args()


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        message = f"{number}: at least 1"
        raise argparse.ArgumentTypeError(message)
    return number


def _commands(nproc: int, folder: Path) -> dict[str, list[str]]:
    script = folder / "bare.py"
    script.write_text(BARE)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    run = [sys.executable, "-m", "distbench", "run", f"--nproc={nproc}", f"--out={folder}"]
    return {"bare": [*torchrun, str(script)], "default": run, "tiny": [*run, "--model=tiny"]}


def measure_times(commands: dict[str, list[str]], runs: int) -> dict[str, list[float]]:
    """Run the commands in turn, once untimed and `runs` times timed; return wall seconds by command."""
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for turn in range(runs + 1):
        for name, command in commands.items():
            progress(f"time: {name}, " + (f"run {turn} of {runs}" if turn else "warm-up"))
            started = time.monotonic()
            finish(command, start(command))
            if turn:
                seconds[name].append(time.monotonic() - started)
    return seconds


def sample_memory(command: Sequence[str]) -> list[Memory]:
    """Run the command once; return memory samples of all its processes, one per `SAMPLE_SECONDS` or slower."""
    process = start(command)
    samples: list[Memory] = []
    while process.poll() is None:
        samples.append(_memory_of(_descendants(process.pid)))
        time.sleep(SAMPLE_SECONDS)
    finish(command, process)
    return samples


def start(command: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a command; discard its output."""
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def finish(command: Sequence[str], process: subprocess.Popen[bytes]) -> None:
    """Wait for a command, and leave if it failed."""
    if process.wait():
        sys.exit(f"bench: exit code {process.returncode} from: {shlex.join(command)}")


def _descendants(root: int) -> Iterator[int]:
    """Yield `root` and the processes below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        children.setdefault(int(fields[1]), []).append(int(path.parent.name))
    waiting = [root]
    while waiting:
        pid = waiting.pop()
        yield pid
        waiting += children.get(pid, [])


def _memory_of(pids: Iterator[int]) -> Memory:
    rss = pss = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
        except OSError:
            continue
        kib = {words[0]: int(words[1]) for words in map(str.split, lines)}
        rss += kib.get("Rss:", 0) << 10
        pss += kib.get("Pss:", 0) << 10
    return Memory(rss, pss)


def _checks(seconds: dict[str, list[float]], samples: list[Memory]) -> list[Check]:
    bare = statistics.median(seconds["bare"])
    times = [
        Check(f"{name} / bare", statistics.median(seconds[name]) / bare, bound) for name, bound in RATIO_BOUNDS.items()
    ]
    peaks = {"PSS": max(one.pss for one in samples), "RSS": max(one.rss for one in samples)}
    bound = MEMORY_BOUND_BYTES / 2**30
    return times + [Check(f"peak {name} of all ranks", peak / 2**30, bound, " GiB") for name, peak in peaks.items()]


def summary(name: str, values: list[float]) -> str:
    """Median, least and most seconds of a command, in one line."""
    low, high = min(values), max(values)
    return f"{name:8} median {statistics.median(values):6.2f} s   min {low:6.2f} s   max {high:6.2f} s"


def progress(text: str) -> None:
    """Print the current measurement on standard error."""
    print(f"bench: {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
