"""A bench under interference: its processes are stopped, its files are removed or changed while it runs.

DISTBENCH_SOAK=1 stops every process, with every signal, at several moments.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from distbench.distributed.heartbeat import read_position
from distbench.launcher.job import heartbeat_path
from tests.end_to_end.launches import SOAK, Bench, command_line, slowed, wait_until, write_suite

RANKS, CASES = 2, 60
LIMIT_S = 2.0
HELPERS = ("fork server", "resource tracker")
PROCESSES = (*HELPERS, *(f"rank {rank}" for rank in range(RANKS)))


def process(bench: Bench, name: str) -> int:
    """Process id within a bench: a rank by its heartbeat, a helper by its parent or its command line."""
    if name.startswith("rank "):
        position = read_position(heartbeat_path(bench.out, int(name.split()[1])))
        assert position is not None
        return position.pid
    (found,) = bench.fork_servers() if name == "fork server" else filter(_is_tracker, bench.left())
    return found


def _is_tracker(pid: int) -> bool:
    return "multiprocessing.resource_tracker" in command_line(pid)


def suite_under_way(tmp_path: Path, cases: int = CASES, limit_s: float = 0.0) -> Bench:
    """Running suite of tiny cases, four of which have results."""
    suite = write_suite(tmp_path / "suite.json", range(cases), timeout=limit_s or LIMIT_S * slowed())
    bench = Bench(tmp_path / "out", "suite", suite, f"--nproc={RANKS}")
    assert wait_until(lambda: len(bench.reports) > 3, 60)
    return bench


@pytest.mark.parametrize("name", HELPERS)
def test_suite_whose_helper_process_is_stopped_completes(tmp_path: Path, name: str) -> None:
    with suite_under_way(tmp_path) as bench:
        os.kill(process(bench, name), signal.SIGSTOP)
        assert bench.finish(60) == 0
        assert wait_until(bench.gone, 20)
    assert len(bench.verdicts) == CASES


def test_suite_whose_fork_server_is_stopped_before_the_first_rank_completes(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(3), timeout=LIMIT_S * slowed())
    with Bench(tmp_path / "out", "suite", suite, f"--nproc={RANKS}") as bench:
        assert wait_until(lambda: bool(bench.fork_servers()), 60)
        os.kill(process(bench, "fork server"), signal.SIGSTOP)
        assert bench.finish(60) == 0


@pytest.mark.parametrize("rank", range(RANKS))
def test_rank_stopped_together_with_the_fork_server_is_named_within_its_limit(tmp_path: Path, rank: int) -> None:
    limit_s = LIMIT_S * slowed()
    with suite_under_way(tmp_path, limit_s=limit_s) as bench:
        for name in ("fork server", f"rank {rank}"):
            os.kill(process(bench, name), signal.SIGSTOP)
        stopped = time.monotonic()
        assert wait_until(lambda: "HANG" in bench.verdicts.values(), limit_s + 30)
        assert time.monotonic() - stopped > limit_s - 1
        assert bench.finish(90) == 3
        assert wait_until(bench.gone, 20)
    (report,) = (report for report in bench.reports if report["verdict"] != "PASS")
    assert [(one["code"], one["rank"]) for one in report["reasons"]] == [("hang", rank)]
    assert len(bench.verdicts) == CASES


STOPPED_TOGETHER = [PROCESSES]
SIGNALS = [signal.SIGINT, signal.SIGTERM]
if SOAK:
    STOPPED_TOGETHER += [(name,) for name in PROCESSES]
    SIGNALS += [signal.SIGHUP]


@pytest.mark.parametrize("number", SIGNALS)
@pytest.mark.parametrize("names", STOPPED_TOGETHER, ids="+".join)
def test_signal_ends_a_bench_whose_processes_are_stopped(
    tmp_path: Path, names: tuple[str, ...], number: signal.Signals
) -> None:
    with suite_under_way(tmp_path, 400) as bench:
        for name in names:
            os.kill(process(bench, name), signal.SIGSTOP)
        sent = time.monotonic()
        bench.process.send_signal(number)
        assert bench.finish(10) == 128 + number
        assert wait_until(bench.gone, 30 - (time.monotonic() - sent))
    assert bench.summary["finished"] == len(bench.reports)


@pytest.mark.skipif(not SOAK, reason="long: set DISTBENCH_SOAK=1")
def test_bench_that_is_stopped_and_continued_loses_no_result(tmp_path: Path) -> None:
    limit_s = LIMIT_S * slowed()
    with suite_under_way(tmp_path, 400, limit_s) as bench:
        for _ in range(3):
            bench.process.send_signal(signal.SIGSTOP)
            time.sleep(2 * limit_s)
            bench.process.send_signal(signal.SIGCONT)
            time.sleep(0.5)
        assert bench.finish(90) == 0
    assert set(bench.verdicts.values()) == {"PASS"}


def _replace_by_folder(path: Path) -> None:
    path.unlink(missing_ok=True)
    path.mkdir()


DISTURBANCES: dict[str, Callable[[Path], object]] = {
    "results are cut": lambda out: (out / "results.jsonl").write_bytes(b""),
    "results are removed": lambda out: (out / "results.jsonl").unlink(),
    "results are something else": lambda out: (out / "results.jsonl").write_bytes(b"{}\n" * 10_000),
    "results are a folder": lambda out: _replace_by_folder(out / "results.jsonl"),
    "the folder is removed": shutil.rmtree,
    "the heartbeats are removed": lambda out: shutil.rmtree(out / "ranks"),
    "the summary is a folder": lambda out: _replace_by_folder(out / "summary.json"),
}
SEEN_AT_THE_END = {"the summary is a folder": 20}
"""Cases of suites that run to their end first."""


@pytest.mark.parametrize("disturbance", DISTURBANCES)
def test_changed_or_removed_results_end_the_bench_with_one_line_and_exit_code_3(
    tmp_path: Path, disturbance: str
) -> None:
    with suite_under_way(tmp_path, SEEN_AT_THE_END.get(disturbance, 200)) as bench:
        DISTURBANCES[disturbance](bench.out)
        assert bench.finish(60) == 3
        assert wait_until(bench.gone, 20)
    told = bench.stderr.splitlines()[-1]
    assert told.startswith("distbench: RESULTS_LOST: ")
    assert str(bench.out) in told
    assert "name another one with --out" in told
    assert told.endswith("the same command resumes with the remaining results")  # not that all is kept
    assert "Traceback" not in bench.stderr
    assert "terminate called" not in bench.stderr


def test_removed_folder_of_a_run_ends_it_with_one_line_and_exit_code_3(tmp_path: Path) -> None:
    more = ("--model=tiny", f"--nproc={RANKS}", "--num-experts=8", "--repeats=100", "--report=junit,json")
    with Bench(tmp_path / "out", "run", *more) as bench:
        assert wait_until(lambda: len(list(bench.out.glob("ranks/*.heartbeat"))) == RANKS, 60)
        shutil.rmtree(bench.out)
        assert bench.finish(60) == 3
        assert wait_until(bench.gone, 20)
    assert "distbench: RESULTS_LOST: " in bench.stderr
    assert "Traceback" not in bench.stderr
