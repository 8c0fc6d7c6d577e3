"""Ctrl-C and SIGTERM: all processes end soon, finished results are kept, and no file or process is left."""

from __future__ import annotations

import fcntl
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.end_to_end.launches import ROOT, SOAK, Bench, FreshBench, faulty, shared_memory, wait_until, write_suite

NPROC = 3
CASES = 400


@pytest.fixture
def scratch() -> Iterator[Path]:
    """Yield an empty TMPDIR; pytest's own is too deep for a Unix socket."""
    folder = Path(tempfile.mkdtemp(prefix="db-"))
    yield folder
    shutil.rmtree(folder)


def listening(pids: list[int]) -> set[str]:
    """Inodes of the TCP sockets on which these processes listen."""
    held = {link for pid in pids for link in links(Path(f"/proc/{pid}/fd"))}
    return {inode for inode in listened() if f"socket:[{inode}]" in held}


def listened() -> set[str]:
    lines = (Path("/proc/net/tcp").read_text() + Path("/proc/net/tcp6").read_text()).splitlines()
    return {line.split()[9] for line in lines if line.split()[3] == "0A"}


def links(folder: Path) -> list[str]:
    try:
        return [str(link.readlink()) for link in folder.iterdir()]
    except OSError:
        return []


def interrupt(bench: Bench, number: int) -> float:
    """Send SIGINT or SIGHUP as a terminal does, to all, or SIGTERM as `kill` does, to one; return the time."""
    if number in (signal.SIGINT, signal.SIGHUP):
        os.killpg(bench.process.pid, number)
    else:
        bench.process.send_signal(number)
    return time.monotonic()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_during_a_suite_leaves_only_its_results(tmp_path: Path, scratch: Path, number: int) -> None:
    before = shared_memory()
    suite = write_suite(tmp_path / "suite.json", range(CASES))
    with Bench(tmp_path / "out", "suite", suite, f"--nproc={NPROC}", TMPDIR=str(scratch)) as bench:
        assert wait_until(lambda: len(bench.reports) > 1, 60)
        sockets = listening(bench.left())
        assert sockets
        sent = interrupt(bench, number)
        assert bench.finish() == 128 + number
        assert wait_until(bench.gone, 30 - (time.monotonic() - sent))
    assert not sockets & listened()
    assert not shared_memory() - before
    assert not list(scratch.iterdir())
    summary = bench.summary
    assert summary["stopped"] == f"ended by {signal.Signals(number).name}"
    assert summary["finished"] == summary["verdicts"]["PASS"] == len(bench.reports)
    assert 1 < summary["finished"] < CASES
    assert bench.stderr.splitlines()[-1].startswith("distbench: INTERRUPTED: ended by SIG")
    assert "Traceback" not in bench.stderr


def test_signal_during_a_run_leaves_its_report_files(tmp_path: Path) -> None:
    more = ("--model=tiny", "--nproc=2", "--num-experts=8", "--repeats=1000000", "--report=junit,json")
    with Bench(tmp_path / "out", "run", *more) as bench:
        assert wait_until(lambda: len(list(bench.out.glob("ranks/*.heartbeat"))) == 2, 60)
        interrupt(bench, signal.SIGTERM)
        assert bench.finish() == 143
        document = json.loads((bench.out / "results.json").read_text())
        assert (document["results"], document["missing"], document["exit_code"]) == ([], 1, 143)
        assert "1 case of the suite without a result: ended by SIGTERM" in (bench.out / "junit.xml").read_text()


def sees_to_signals(pid: int) -> bool:
    """Return whether a process catches SIGTERM."""
    try:
        (line,) = (line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("SigCgt:"))
    except (OSError, ValueError):
        return False
    return bool(int(line.split()[1], 16) >> (signal.SIGTERM - 1) & 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signal_before_the_first_launch_ends_the_bench_with_its_exit_code(tmp_path: Path, number: int) -> None:
    with FreshBench(tmp_path / "out", "suite", "smoke", "--nproc=2", "--quiet") as bench:
        while not sees_to_signals(bench.process.pid):
            assert bench.process.poll() is None
        bench.process.send_signal(number)
        assert bench.finish(10) == 128 + number
        assert wait_until(bench.gone, 20)
    assert bench.stderr.startswith("distbench: INTERRUPTED: ended by SIG")
    assert bench.stderr.count("\n") == 1


def test_main_module_loads_no_library_before_its_signal_handlers() -> None:
    asked = "import sys, distbench.__main__; print(sorted({'argparse', 'msgspec', 'torch'} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-S", "-c", asked], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout == "[]\n"


@pytest.mark.parametrize(("number", "seconds"), [(signal.SIGINT, 0.4), (signal.SIGTERM, 1.0)])
def test_signal_while_ranks_start_leaves_no_process(tmp_path: Path, scratch: Path, number: int, seconds: float) -> None:
    suite = write_suite(tmp_path / "suite.json", range(CASES))
    with Bench(tmp_path / "out", "suite", suite, f"--nproc={NPROC}", TMPDIR=str(scratch)) as bench:
        assert wait_until((tmp_path / "out" / "ranks").exists, 30)
        time.sleep(seconds)
        sent = interrupt(bench, number)
        assert bench.finish() == 128 + number
        assert wait_until(bench.gone, 30 - (time.monotonic() - sent))
    assert bench.summary["stopped"] == f"ended by {signal.Signals(number).name}"
    assert not list(scratch.iterdir())
    assert "Traceback" not in bench.stderr


@pytest.mark.parametrize("moment", range(12 if SOAK else 1))
def test_signal_at_any_moment_of_many_launches_leaves_no_process(tmp_path: Path, moment: int) -> None:
    number = (signal.SIGINT, signal.SIGTERM)[moment % 2]
    suite = write_suite(tmp_path / "suite.json", range(CASES))
    always = faulty("0:0:start:kill")
    with Bench(tmp_path / "out", "suite", suite, "--nproc=2", f"--max-faults={CASES}", **always) as bench:
        assert wait_until(lambda: bool(bench.reports), 60)
        time.sleep(random.Random(moment).random() * 2)
        interrupt(bench, number)
        assert bench.finish(10) == 128 + number
        assert wait_until(bench.gone, 20)
    assert bench.summary["stopped"] == f"ended by {signal.Signals(number).name}"
    assert bench.summary["finished"] == len(bench.verdicts)


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -9)])
def test_hanging_ranks_end_if_the_supervisor_ends(tmp_path: Path, number: int, exit_code: int) -> None:
    fired = tmp_path / "fired"
    suite = write_suite(tmp_path / "suite.json", range(3))
    faults = faulty("1:1:padded/experts:stop+0:1:padded/experts:sleep", once=fired)
    with Bench(tmp_path / "out", "suite", suite, "--nproc=2", **faults) as bench:
        assert wait_until(fired.exists, 60)
        bench.process.send_signal(number)
        assert bench.finish(10) == exit_code
        assert wait_until(bench.gone, 20)
    assert bench.verdicts == {"seed=0": "PASS"}


def test_ctrl_c_while_waiting_for_the_folder_lock_ends_the_bench(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    with (out / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with Bench(out, "run", "--model=tiny", "--lock-timeout=60") as bench:
            assert wait_until(lambda: str(out / ".lock") in links(Path(f"/proc/{bench.process.pid}/fd")), 60)
            interrupt(bench, signal.SIGINT)
            assert bench.finish() == 130
    assert bench.stderr.splitlines()[-1].startswith("distbench: INTERRUPTED: ")
    assert "Traceback" not in bench.stderr


def test_nohup_lets_a_suite_outlive_its_terminal(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(20))
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        bench = FreshBench(tmp_path / "out", "suite", suite, "--nproc=2")
    finally:
        signal.signal(signal.SIGHUP, ignored)
    with bench:
        assert wait_until(lambda: bool(bench.reports), 60)
        interrupt(bench, signal.SIGHUP)
        assert bench.finish() == 0
    assert len(bench.reports) == 20
