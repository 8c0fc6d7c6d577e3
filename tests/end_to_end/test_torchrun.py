"""distbench ranks under plain torchrun, without a supervisor."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from distbench.launcher.job import clear_ranks, failure_path, heartbeat_path, stack_path
from distbench.launcher.locks import hold
from tests.end_to_end.launches import TINY, Torchrun, faulty, wait_until

ROOT = Path(__file__).parents[2]


def torchrun(out: Path, *arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "3",
        "-m", "distbench", "run", "--model", "tiny", "--out", str(out), *arguments,
    ]  # fmt: skip
    return subprocess.run(
        command, capture_output=True, text=True, timeout=100, env=os.environ | environ, check=False, cwd=ROOT
    )


def collected(out: Path) -> dict[str, Any]:
    """Run `collect` on `out`, and return the report of its one case."""
    command = [sys.executable, "-m", "distbench", "collect", str(out)]
    assert subprocess.run(command, capture_output=True, check=False, cwd=ROOT).returncode == 3
    report: dict[str, Any] = json.loads((out / "results.jsonl").read_text())
    return report


def test_only_rank_0_prints_and_all_ranks_exit_with_one_code_under_torchrun(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--tokens", "0,5,9", ATOM_X="1")
    assert done.returncode == 0
    assert done.stdout.count("PASS (emulated") == 1
    assert (done.stdout + done.stderr).count("set and not used by this case: ATOM_X=1") == 1
    assert json.loads((tmp_path / "report.json").read_text())["verdict"] == "PASS"


def test_wrong_result_fails_the_torchrun_job(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--limit", "max-recv-1")
    assert done.returncode == 1
    assert done.stdout.count("UNDER_LIMIT (emulated") == 1


def test_exception_on_one_rank_ends_all_ranks_and_is_printed_once(tmp_path: Path) -> None:
    fault = faulty("2:0:control/experts:raise")
    start = time.monotonic()
    done = torchrun(tmp_path, **fault)
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("distbench:")]
    assert told == ["distbench: RANK_FAULT: rank 2 raised ValueError in control/experts: injected"]
    assert time.monotonic() - start < 40


def test_refusal_during_a_pass_ends_all_ranks_and_names_its_rank(tmp_path: Path) -> None:
    start = time.monotonic()
    checked = ("--experts", "aiter", "--emulate", "--max-dispatch-tokens-per-rank", "64")
    done = torchrun(tmp_path, *checked, "--policy", "unchecked", "--inject", "weights-not-cut:rank=1")
    assert done.returncode == 1
    told = [line for line in done.stderr.splitlines() if line.startswith("distbench:")]
    place = "rank 1 raised DistbenchError in truncated/experts: aiter's fused_moe: topk_weight has 192 rows"
    assert [line.startswith(f"distbench: RANK_FAULT: {place}") for line in told] == [True]
    assert time.monotonic() - start < 40


def test_invalid_value_under_torchrun_is_printed_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path, "--seed", "x")
    told = [line for line in done.stderr.splitlines() if line.startswith("distbench:")]
    assert told == ["distbench: INVALID: --seed = 'x': Expected `int`, got `str`"]


def test_collect_names_the_rank_that_died(tmp_path: Path) -> None:
    assert torchrun(tmp_path, **faulty("1:0:truncated/experts:kill")).returncode == 1
    report = collected(tmp_path)
    assert report["verdict"] == "RANK_FAULT"
    (reason,) = report["reasons"]
    assert (reason["rank"], reason["message"]) == (1, "rank 1 ended without an error message in truncated/experts")


@pytest.mark.parametrize(
    ("place", "told"), [("control/experts", "rank 2 stood in control/experts; "), ("boot", "rank 2 never began; ")]
)
def test_collect_names_the_rank_that_hung(tmp_path: Path, place: str, told: str) -> None:
    assert torchrun(tmp_path, "--timeout", "4", **faulty(f"2:0:{place}:sleep")).returncode == 1
    report = collected(tmp_path)
    assert report["verdict"] == "HANG"
    assert [reason["rank"] for reason in report["reasons"]] == [2]
    waited = r"rank \d(, \d)? waited until the collective timed out"
    assert re.fullmatch(told + waited, report["reasons"][0]["message"])


def test_collect_names_the_rank_that_was_behind_if_all_were_killed(tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    with Torchrun(tmp_path / "out", "run", "--model=tiny", **faulty("2:0:control/experts:sleep", once=fired)) as bench:
        assert wait_until(fired.exists, 60)
        for command in (("run", "--model=tiny", "--out"), ("collect",)):
            refused = subprocess.run(
                [sys.executable, "-m", "distbench", *command, str(bench.out)],
                capture_output=True, text=True, check=False, cwd=ROOT,
            )  # fmt: skip
            assert refused.returncode == 3
            assert f"distbench: BUSY: folder {bench.out} is in use by process " in refused.stderr
        bench.end_at_once()
    report = collected(tmp_path / "out")
    assert report["verdict"] == "HANG"
    message = "rank 2 was behind in control/experts, rank 0, 1 waited; all ended without an error message"
    assert [(reason["rank"], reason["message"]) for reason in report["reasons"]] == [(2, message)]


def test_suite_under_torchrun_resumes_with_its_finished_results(tmp_path: Path) -> None:
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
        "-m", "distbench", "suite", "smoke", "--out", str(tmp_path), "--select", "!name~gaussian",
    ]  # fmt: skip
    journal = tmp_path / "results.jsonl"
    assert subprocess.run(command, capture_output=True, check=False, cwd=ROOT).returncode == 0
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == len(lines) - 5
    hashes = [json.loads(line)["case"]["hash"] for line in journal.read_text().splitlines()]
    assert sorted(hashes) == sorted({json.loads(line)["case"]["hash"] for line in lines})


def small_suite(path: Path, *ep_sizes: int, **defaults: object) -> Path:
    """Write a suite of tiny cases, one for each of `ep_sizes`."""
    cases = [{"seed": seed, "ep_size": ep_size} for seed, ep_size in enumerate(ep_sizes)]
    path.write_text(json.dumps({"defaults": TINY | defaults, "include": cases}))
    return path


@pytest.mark.parametrize("last", [(3,), ()], ids=["called back", "until the end"])
def test_ranks_outside_the_group_wait_beyond_the_timeout_of_a_stage(tmp_path: Path, last: tuple[int, ...]) -> None:
    suite = small_suite(tmp_path / "suite.json", 2, 2, 2, 2, *last, timeout=2)
    pauses = "+".join(f"0:{case}:{arm}/experts:pause" for case in range(4) for arm in ("padded", "truncated"))
    with Torchrun(tmp_path / "out", "suite", suite, **faulty(pauses)) as bench:
        assert bench.finish() == 0, bench.stderr
    assert list(bench.verdicts.values()) == ["PASS"] * (4 + len(last))
    assert "[rank2]" not in bench.stderr


def test_collect_names_no_rank_outside_the_group(tmp_path: Path) -> None:
    suite = small_suite(tmp_path / "suite.json", 2, 2, 3)
    with Torchrun(tmp_path / "out", "suite", suite, **faulty("1:1:control/experts:kill")) as bench:
        assert bench.finish() == 1
    subprocess.run([sys.executable, "-m", "distbench", "collect", str(bench.out)], check=False, cwd=ROOT)
    assert bench.verdicts == {"seed=0 ep_size=2": "PASS", "seed=1 ep_size=2": "RANK_FAULT"}
    assert [reason["rank"] for reason in bench.reports[-1]["reasons"]] == [1]


def test_rank_changes_no_file_in_a_folder_that_another_bench_locks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    theirs = [heartbeat_path(out, 2), failure_path(out, 2), failure_path(out, 7), stack_path(out, 1)]
    clear_ranks(out)
    for path in theirs:
        path.write_text("theirs")
    with hold(out, (), 0.0):
        waiting = Torchrun(out, "run", "--model=tiny", "--timeout=2", "--lock-timeout=60")
        time.sleep(20)  # longer than loading torch plus the timeout of a stage
        with Torchrun(out, "run", "--model=tiny") as refused:
            assert refused.finish() == 1
        assert [path.read_text() for path in theirs] == ["theirs"] * len(theirs)
        assert f"distbench: BUSY: folder {out} is in use by process " in refused.stderr
        assert len(refused.stderr.split("distbench: ")) == 2
    with waiting:
        assert waiting.finish() == 0, waiting.stderr
    assert not failure_path(out, 7).exists()


def test_quiet_flag_prints_no_case_under_torchrun(tmp_path: Path) -> None:
    suite = small_suite(tmp_path / "suite.json", 2)
    with Torchrun(tmp_path / "out", "suite", suite, "--quiet") as bench:
        assert bench.finish() == 0
    assert bench.stdout == ""
