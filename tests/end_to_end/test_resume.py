"""The same command resumes after any interruption: every case has one result, and runs once.

DISTBENCH_SOAK=1 kills at 20 moments instead of 3, and runs twice as many cases, on four ranks.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import time
from pathlib import Path

import pytest

from tests.end_to_end.in_process import Run
from tests.end_to_end.launches import SOAK, Bench, shared_memory, wait_until, write_suite

CASES = 60 if SOAK else 30
RANKS = 4 if SOAK else 3
MOMENTS = range(20 if SOAK else 3)


def run(out: Path, *arguments: str | Path) -> Run:
    """Run a suite to its end on one rank."""
    return Run(out, "suite", "--nproc=1", *arguments)


def lines(out: Path) -> dict[str, bytes]:
    """Raw lines of the journal, by case name."""
    raw = (out / "results.jsonl").read_bytes().splitlines()
    found = {json.loads(line)["name"]: line for line in raw}
    assert len(found) == len(raw)
    return found


def whole_lines(out: Path) -> bytes:
    """Journal without a torn last line."""
    path = out / "results.jsonl"
    content = path.read_bytes() if path.exists() else b""
    return content[: content.rfind(b"\n") + 1]


def kill(bench: Bench, chance: random.Random, *, everything: bool) -> None:
    """Kill the supervisor, or all of its processes, after some number of results and some milliseconds more."""
    results = chance.randrange(CASES)
    assert wait_until(lambda: len(bench.reports) >= results, 60)
    time.sleep(chance.random() * (0.05 if results else 2))
    if everything:
        os.killpg(bench.process.pid, signal.SIGKILL)
    else:
        bench.process.kill()
    bench.process.wait()


def cut_last_line(out: Path, chance: random.Random) -> None:
    path = out / "results.jsonl"
    content = path.read_bytes() if path.exists() else b""
    last = content[:-1].rfind(b"\n") + 1
    path.write_bytes(content[: chance.randrange(last, max(len(content), 1))])


@pytest.mark.parametrize("moment", MOMENTS)
def test_suite_killed_at_any_moment_resumes_to_one_result_per_case(tmp_path: Path, moment: int) -> None:
    chance = random.Random(moment)
    out = tmp_path / "out"
    command = ("suite", write_suite(tmp_path / "suite.json", range(CASES)), f"--nproc={RANKS}", "--quiet")
    others = shared_memory()
    with Bench(out, *command) as bench:
        kill(bench, chance, everything=moment % 2 == 1)
        assert wait_until(bench.gone, 2)
    for segment in shared_memory() - others:  # the process that would have removed these was killed too
        segment.unlink(missing_ok=True)
    if moment % 3 == 2:
        cut_last_line(out, chance)
    before = whole_lines(out)
    resumed = Run(out, *command)
    assert resumed.exit_code == 0
    after = (out / "results.jsonl").read_bytes()
    assert after.startswith(before)
    assert after.endswith(b"}\n")
    assert resumed.verdicts == {f"seed={seed}": "PASS" for seed in range(CASES)}
    assert resumed.summary["finished"] == CASES


def test_resumed_suite_runs_missing_cases_and_those_that_rerun_selects(tmp_path: Path) -> None:
    out, path = tmp_path / "out", tmp_path / "suite.json"
    write_suite(path, range(3), expect=[{"verdict": "UNDER_LIMIT", "match": {"seed": 1}}])
    assert run(out, path).exit_code == 1
    first = lines(out)
    assert [json.loads(line)["as_expected"] for line in first.values()] == [True, False, True]

    shutil.rmtree(out / "ranks")
    assert run(out, path).exit_code == 1
    assert not (out / "ranks").exists()  # no rank has started
    assert lines(out) == first

    cut_last_line(out, random.Random(0))
    assert run(out, path, "--rerun=failed").exit_code == 1
    second = lines(out)
    assert {name for name in first if first[name] != second[name]} == {"seed=1", "seed=2"}

    with (out / "results.jsonl").open("ab") as file:
        file.write(b"{}\n")
    refused = run(out, path)
    assert refused.exit_code == 2
    assert f"distbench: INVALID: {out}/results.jsonl, line 4: " in refused.stderr

    assert run(out, path, "--rerun=all").exit_code == 1
    third = lines(out)
    assert {name for name in first if second[name] != third[name]} == {"seed=0", "seed=1", "seed=2"}

    write_suite(path, [0, 2, 5])
    assert run(out, path).exit_code == 0
    assert lines(out).items() - third.items() == {("seed=5", lines(out)["seed=5"])}


def test_second_bench_in_a_folder_is_refused_unless_it_waits_for_the_lock(tmp_path: Path) -> None:
    command = ("suite", write_suite(tmp_path / "suite.json", range(CASES)), "--nproc=2")
    with Bench(tmp_path / "out", *command) as first, Bench(tmp_path / "other", *command) as other:
        lock = tmp_path / "out" / ".lock"
        assert wait_until(lambda: lock.exists() and lock.stat().st_size > 0, 10)
        with Bench(tmp_path / "out", *command) as second:
            assert second.finish(10) == 3
        with Bench(tmp_path / "out", *command, "--lock-timeout=60") as third:
            assert third.finish() == 0
            assert "PASS" not in third.stderr
        assert (first.finish(), other.finish()) == (0, 0)
    held = rf"folder \S+/out is in use by process {first.process.pid} \(.*\) since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d;"
    assert re.search(rf"^distbench: BUSY: {held}", second.stderr, re.MULTILINE)
    assert len(first.verdicts) == len(other.verdicts) == CASES
    assert third.summary["finished"] == CASES
