"""`suite --for` over real ranks: it ends in time, skips the same cases on all ranks, and resumes with them."""

from __future__ import annotations

import json
import time
from pathlib import Path

from tests.end_to_end.in_process import Run
from tests.end_to_end.launches import TINY, Torchrun, slowed

CASES = 40


def write_slow_suite(path: Path) -> Path:
    """Write cases that wait up to 100 ms before each stage, every other one of them on one rank of two."""
    axes = {"seed": list(range(CASES // 2)), "ep_size": [2, 1]}
    path.write_text(json.dumps({"defaults": TINY | {"jitter": 100, "num_experts": 8}, "axes": axes}))
    return path


def test_suite_with_a_time_budget_ends_in_time_and_resumes(tmp_path: Path) -> None:
    suite = write_slow_suite(tmp_path / "suite.json")
    arguments = ("suite", suite, "--nproc", "2")
    budget_s = 6
    run = Run(tmp_path / "out", *arguments, "--for", f"{budget_s}s")
    assert run.exit_code == 75, run.stderr
    found, summary = run.verdicts, run.summary
    assert f"cases left out for time (--for {budget_s} s: " in run.stdout
    assert run.seconds < budget_s + 25 * slowed()  # to end ranks that are still starting, on a busy machine
    assert len(found) < CASES
    assert set(found.values()) <= {"PASS"}  # none if ranks take that long to start
    assert (summary["finished"], summary["left_for_time"]) == (len(found), CASES - len(found))
    path = tmp_path / "out" / "results.jsonl"
    path.touch()  # where ranks took that long to start
    kept = path.read_bytes()
    run = Run(tmp_path / "out", *arguments, "--for", "1s")
    assert run.exit_code == 75, run.stderr
    assert path.read_bytes() == kept


def test_end_of_the_slurm_job_is_the_deadline_under_torchrun(tmp_path: Path) -> None:
    suite = write_slow_suite(tmp_path / "suite.json")
    end = {"SLURM_JOB_END_TIME": str(int(time.time()) + 1)}  # before any rank has started
    with Torchrun(tmp_path / "out", "suite", suite, "--select", "seed=0", "--num-experts", "6", **end) as bench:
        assert bench.finish(90) != 0
        assert bench.verdicts == {}
        assert "exitcode  : 75" in bench.stderr, bench.stderr
