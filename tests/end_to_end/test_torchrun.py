"""distbench ranks under plain torchrun, without a supervisor."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest

from distbench.cli.main import main
from distbench.distributed.heartbeat import read_position
from distbench.launcher.job import clear_ranks, failure_path, heartbeat_path, stack_path
from distbench.launcher.locks import hold
from tests.end_to_end.launches import SOAK, TINY, Torchrun, TorchrunOfThree, faulty, slowed, wait_until
from tests.end_to_end.prestarted import FRESH_RANKS
from tests.slim_wheel import vllm_wheel

TIMEOUT_S = 2
"""Limit of a stage on an idle machine; one rank may take so much longer than another to load torch."""
PAUSES_S = 6
LONG = "--timeout=80000"
"""Limit of a stage beyond the one of a test: ranks that waited for it would not end in time."""


def torchrun(out: Path, exit_code: int, *arguments: str, **environ: str) -> Torchrun:
    """Run one case of the tiny layer to its end, on two ranks; with another exit code the test prints what was said."""
    bench = Torchrun(out, "run", "--model=tiny", *arguments, **environ)
    with bench:
        assert bench.finish() == exit_code
    return bench


def collected(out: Path) -> dict[str, Any]:
    """Run `collect` on `out`, and return the last report."""
    assert main(["collect", str(out)]) == 3
    report: dict[str, Any] = json.loads((out / "results.jsonl").read_text().splitlines()[-1])
    return report


def said(bench: Torchrun) -> list[str]:
    return [line for line in bench.stderr.splitlines() if line.startswith("distbench:")]


def test_only_rank_0_prints_and_all_ranks_exit_with_one_code_under_torchrun(tmp_path: Path) -> None:
    caller = ("--profile=vllm", "--emulate", f"--caller-wheel={vllm_wheel(tmp_path)}")
    done = torchrun(tmp_path / "out", 0, "--tokens=0,5", *caller, ATOM_X="1", **{FRESH_RANKS: "1"})
    assert done.stdout.count("PASS (emulated") == 1
    assert (done.stdout + done.stderr).count("set and not used by this case: ATOM_X=1") == 1
    assert done.report["verdict"] == "PASS"
    assert "production == " in done.stdout


def test_wrong_result_fails_the_torchrun_job(tmp_path: Path) -> None:
    done = torchrun(tmp_path / "out", 1, "--limit=max-recv-1")
    assert done.stdout.count("UNDER_LIMIT (emulated") == 1


def test_exception_on_one_rank_ends_all_ranks_and_is_printed_once(tmp_path: Path) -> None:
    fired = tmp_path / "fired"
    done = torchrun(tmp_path / "out", 1, LONG, **faulty("1:0:control/experts:raise", once=fired))
    assert fired.exists()
    assert said(done) == ["distbench: RANK_FAULT: rank 1 raised ValueError in control/experts: injected"]


def test_refusal_during_a_pass_ends_all_ranks_and_names_its_rank(tmp_path: Path) -> None:
    checked = (LONG, "--experts=aiter", "--emulate", "--max-dispatch-tokens-per-rank=64")
    done = torchrun(tmp_path / "out", 1, *checked, "--policy=unchecked", "--inject=weights-not-cut:rank=1")
    place = "rank 1 raised DistbenchError in truncated/experts: aiter's fused_moe: topk_weight has 128 rows"
    assert [line.startswith(f"distbench: RANK_FAULT: {place}") for line in said(done)] == [True]


def test_invalid_value_under_torchrun_is_printed_once(tmp_path: Path) -> None:
    done = torchrun(tmp_path / "out", 1, "--seed=x")
    assert said(done) == ["distbench: INVALID: --seed = 'x': allowed are whole numbers"]


@pytest.mark.parametrize(
    ("place", "told"), [("control/experts", "rank 2 stood in control/experts; "), ("boot", "rank 2 never began; ")]
)
def test_collect_names_the_rank_that_hung(tmp_path: Path, place: str, told: str) -> None:
    command = ("run", "--model=tiny", f"--timeout={2 * TIMEOUT_S * slowed()}")
    with TorchrunOfThree(tmp_path / "out", *command, **faulty(f"2:0:{place}:sleep")) as bench:
        assert bench.finish() == 1
    report = collected(bench.out)
    assert report["verdict"] == "HANG"
    assert [reason["rank"] for reason in report["reasons"]] == [2]
    waited = r"rank \d(, \d)? waited until the collective timed out"
    assert re.fullmatch(told + waited, report["reasons"][0]["message"])


def progress(out: Path, rank: int) -> tuple[int, ...]:
    at = read_position(heartbeat_path(out, rank))
    return at.progress if at else ()


def test_collect_names_the_rank_that_was_behind_if_all_were_killed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fired = tmp_path / "fired"
    hung = faulty("2:0:control/experts:sleep", once=fired)
    with TorchrunOfThree(tmp_path / "out", "run", "--model=tiny", **hung) as bench:
        assert wait_until(fired.exists, 60)
        assert wait_until(lambda: all(progress(bench.out, rank) > progress(bench.out, 2) for rank in (0, 1)), 60)
        for command in (("run", "--model=tiny", "--out"), ("collect",)):
            assert main([*command, str(bench.out)]) == 3
            assert f"distbench: BUSY: folder {bench.out} is in use by process " in capsys.readouterr().err
        bench.end_at_once()
    report = collected(tmp_path / "out")
    assert report["verdict"] == "HANG"
    message = "rank 2 was behind in control/experts, rank 0, 1 waited; all ended without an error message"
    assert [(reason["rank"], reason["message"]) for reason in report["reasons"]] == [(2, message)]


def test_suite_under_torchrun_resumes_with_its_finished_results_and_prints_no_case_if_quiet(tmp_path: Path) -> None:
    command = ("suite", "smoke", "--select", "!name~gaussian")
    journal = tmp_path / "out" / "results.jsonl"
    with Torchrun(tmp_path / "out", *command, "--quiet") as bench:
        assert bench.finish() == 0
    assert bench.stdout == ""
    lines = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(lines[:5]) + lines[5][:40])
    with Torchrun(tmp_path / "out", *command) as bench:
        assert bench.finish() == 0
    assert len(bench.stdout.splitlines()) == len(lines) - 5
    hashes = [json.loads(line)["case"]["hash"] for line in journal.read_text().splitlines()]
    assert sorted(hashes) == sorted({json.loads(line)["case"]["hash"] for line in lines})


def small_suite(path: Path, *ep_sizes: int, **defaults: object) -> Path:
    """Write a suite of tiny cases, one for each of `ep_sizes`."""
    cases = [{"seed": seed, "ep_size": ep_size} for seed, ep_size in enumerate(ep_sizes)]
    path.write_text(json.dumps({"defaults": TINY | defaults, "include": cases}))
    return path


@pytest.mark.parametrize("last", [(3,), ()] if SOAK else [(3,)], ids=["called back", "until the end"][: 1 + SOAK])
def test_ranks_outside_the_group_wait_beyond_the_timeout_of_a_stage(tmp_path: Path, last: tuple[int, ...]) -> None:
    timeout_s = min(TIMEOUT_S * slowed(), PAUSES_S - 1)
    suite = small_suite(tmp_path / "suite.json", 2, 2, *last, timeout=timeout_s)
    pauses = "+".join(f"0:{case}:{arm}/experts:pause" for case in range(2) for arm in ("padded", "truncated"))
    with TorchrunOfThree(tmp_path / "out", "suite", suite, **faulty(pauses)) as bench:
        assert bench.finish() == 0, bench.stderr
    assert list(bench.verdicts.values()) == ["PASS"] * (2 + len(last))
    assert "[rank2]" not in bench.stderr


def test_collect_names_the_rank_that_died_and_no_rank_outside_the_group(tmp_path: Path) -> None:
    suite = small_suite(tmp_path / "suite.json", 2, 2, 3)
    with TorchrunOfThree(tmp_path / "out", "suite", suite, **faulty("1:1:truncated/experts:kill")) as bench:
        assert bench.finish() == 1
    report = collected(bench.out)
    assert bench.verdicts == {"seed=0 ep_size=2": "PASS", "seed=1 ep_size=2": "RANK_FAULT"}
    (reason,) = report["reasons"]
    assert (reason["rank"], reason["message"]) == (1, "rank 1 ended without an error message in truncated/experts")


def waits_for_the_lock(bench: Torchrun, lock: Path) -> bool:
    """Whether rank 0 has opened the lock, and the other rank has connected to torchrun's store to wait for rank 0."""
    opened: dict[str, list[str]] = {}
    for pid in bench.left():
        process = Path(f"/proc/{pid}")
        try:
            variables = dict(one.split("=", 1) for one in (process / "environ").read_text().split("\0") if one)
            opened[variables.get("RANK", "")] = [str(link.readlink()) for link in (process / "fd").iterdir()]
        except OSError:
            return False  # it has just ended, or closed a file
    return str(lock) in opened.get("0", ()) and any(link.startswith("socket:") for link in opened.get("1", ()))


def test_rank_changes_no_file_in_a_folder_that_another_bench_locks(tmp_path: Path) -> None:
    out = tmp_path / "out"
    theirs = [heartbeat_path(out, 2), failure_path(out, 2), failure_path(out, 7), stack_path(out, 1)]
    clear_ranks(out)
    for path in theirs:
        path.write_text("theirs")
    timeout_s = TIMEOUT_S * slowed()
    with hold(out, (), 0.0):
        waiting = Torchrun(
            out, "run", "--model=tiny", f"--timeout={timeout_s}", "--lock-timeout=600", **{FRESH_RANKS: "1"}
        )
        assert wait_until(lambda: waits_for_the_lock(waiting, out / ".lock"), 60)
        waited = time.monotonic()
        with Torchrun(out, "run", "--model=tiny") as refused:
            assert refused.finish() == 1
        time.sleep(max(0.0, 2 * timeout_s - (time.monotonic() - waited)))  # beyond the timeout of a stage
        assert [path.read_text() for path in theirs] == ["theirs"] * len(theirs)
        assert f"distbench: BUSY: folder {out} is in use by process " in refused.stderr
        assert len(refused.stderr.split("distbench: ")) == 2
    with waiting:
        assert waiting.finish() == 0, waiting.stderr
    assert not failure_path(out, 7).exists()
