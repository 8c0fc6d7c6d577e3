"""Memory and file descriptors of the supervisor and of every rank over many cases in one launch.

Sampled at ten points; ranks are found by the process ids in their heartbeats. The growth of each process after the
first point has a bound; exit code 1 if a process exceeds it.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

from distbench.distributed.heartbeat import read_position
from distbench.launcher.job import heartbeat_path
from distbench.report.journal import RESULTS

POINTS = 10
POLL_SECONDS = 0.2
RSS_BOUND_PERCENT = 2.0
FDS_BOUND = 0


class Use(NamedTuple):
    """Memory and descriptors of a process at one moment."""

    rss_bytes: int
    fds: int


class Sample(NamedTuple):
    """Resources of each process after `cases` cases, by process name."""

    cases: int
    uses: dict[str, Use]


def main() -> int:
    """Run, print the table, and return 1 if a process has grown beyond its bound."""
    options = _parse()
    with tempfile.TemporaryDirectory(prefix="distbench-soak-") as folder:
        samples = _soak(Path(folder), options.cases, options.nproc)
    chosen = pick_points(samples, options.cases)
    _print_table(chosen)
    return 0 if _print_growth(chosen) else 1


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=1000, metavar="N", help="cases (default: %(default)s)")
    parser.add_argument("--nproc", type=int, default=2, metavar="P", help="ranks (default: %(default)s)")
    return parser.parse_args()


def _soak(folder: Path, cases: int, nproc: int) -> list[Sample]:
    """Run the cases in one launch; return samples in the order in which they were taken."""
    command = [sys.executable, "-m", "distbench", "suite", str(_write_suite(folder, cases)), "--quiet"]
    command += [f"--nproc={nproc}", f"--out={folder}"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    samples: list[Sample] = []
    lines = _Lines(folder / RESULTS)
    started = time.monotonic()
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        uses = _uses(folder, process.pid, nproc)
        done = lines.count()
        _progress(f"{done}/{cases} cases, {done / (time.monotonic() - started):.1f} cases/s")
        if done and len(uses) == nproc + 1:
            samples.append(Sample(done, uses))
    _progress("\n")
    if process.returncode or lines.count() != cases:
        sys.exit(f"soak: exit code {process.returncode} after {lines.count()} of {cases} cases")
    return samples


def _write_suite(folder: Path, cases: int) -> Path:
    path = folder / "soak.json"
    tiny = {"model": "tiny", "max_dispatch_tokens_per_rank": 64, "tokens": 3}
    path.write_text(json.dumps({"defaults": tiny, "axes": {"seed": list(range(cases))}}))
    return path


class _Lines:
    """Line counter of a growing file that reads each line once."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = self._count = 0

    def count(self) -> int:
        if self._path.exists():
            with self._path.open("rb") as file:
                file.seek(self._offset)
                content = file.read()
            self._offset += len(content)
            self._count += content.count(b"\n")
        return self._count


def _uses(out: Path, supervisor: int, nproc: int) -> dict[str, Use]:
    """Resources of each process; processes that are not running are missing."""
    pids = {"supervisor": supervisor}
    for rank in range(nproc):
        position = read_position(heartbeat_path(out, rank))
        if position is not None:
            pids[f"rank {rank}"] = position.pid
    return {name: use for name, pid in pids.items() if (use := _use(Path(f"/proc/{pid}"))) is not None}


def _use(process: Path) -> Use | None:
    try:
        pages = int((process / "statm").read_text().split()[1])
        return Use(pages * os.sysconf("SC_PAGE_SIZE"), len(list((process / "fd").iterdir()))) if pages else None
    except OSError:
        return None


def pick_points(samples: list[Sample], cases: int) -> list[Sample]:
    """Samples nearest to each tenth of the cases."""
    tenths = [cases * (point + 1) / POINTS for point in range(POINTS)]
    return [min(samples, key=lambda sample: abs(sample.cases - tenth)) for tenth in tenths]


def _print_table(samples: list[Sample]) -> None:
    names = list(samples[0].uses)
    print("cases  " + "".join(f"{name:>20}" for name in names))
    for sample in samples:
        cells = [f"{use.rss_bytes / 2**20:10.1f} MiB {use.fds:3} fd" for use in (sample.uses[name] for name in names)]
        print(f"{sample.cases:<7}" + "".join(f"{cell:>20}" for cell in cells))


def _print_growth(samples: list[Sample]) -> bool:
    """Print the growth of each process since the first sample; return whether all are within the bounds."""
    passed = True
    for name, first in samples[0].uses.items():
        last = samples[-1].uses[name]
        percent, fds = (last.rss_bytes / first.rss_bytes - 1) * 100, last.fds - first.fds
        ok = percent <= RSS_BOUND_PERCENT and fds <= FDS_BOUND
        passed &= ok
        bounds = f"at most {RSS_BOUND_PERCENT:g} % and {FDS_BOUND}: {'ok' if ok else 'MISSED'}"
        print(f"{name}: RSS {percent:+.2f} %, file descriptors {fds:+}, {bounds}")
    return passed


def _progress(text: str) -> None:
    print(f"\rsoak: {text:<60}" if text.strip() else text, end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
