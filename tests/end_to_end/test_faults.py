"""A fault of any kind, on any rank, in any stage: the verdict names it, the other cases pass, and no process is left.

One command takes many faults: each hits the second case of a launch, whose first passes, and the rest goes on in the
next launch. DISTBENCH_SOAK=1 runs every kind of fault on every rank in every stage.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterable
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tests.end_to_end.launches import SOAK, TINY, Bench, faulty, slowed, wait_until, write_suite

RANKS = 3
LIMIT_S = 2.0
"""Limit of a stage on an idle machine: a healthy rank that gets no processor time for so long would count as hung."""
LONGEST_S = 600
BATCH = 15
HANGS = ("stop", "sleep")
KINDS = ("kill", "stop", "raise", "exit", "sleep", "segv", "allocate")
HOW = {
    "kill": "rank {rank} ended by SIGKILL in {place}",
    "segv": "rank {rank} ended by SIGSEGV in {place}",
    "exit": "rank {rank} ended by exit code 0 before it was done in {place}",
    "raise": "rank {rank} raised ValueError in {place}: injected",
    "allocate": "rank {rank} raised RuntimeError in {place}: ",
    "stop": "rank {rank} stood in {place} for ",
    "sleep": "rank {rank} stood in {place} for ",
}
STAGES = ("dispatch", "truncate", "experts", "check", "combine")
PASSES = [f"{arm}/{stage}" for arm, stage in product(("padded", "control", "repadded", "truncated"), STAGES)]
TIMED = ["timing", "padded/timing", "truncated/timing"]
PLACES = ["start", "agree", "workload", *PASSES, *TIMED, "gather", "report"]


class Fault(NamedTuple):
    """A kind of fault, its rank and its place."""

    rank: int
    place: str
    kind: str

    def __str__(self) -> str:
        return f"{self.rank}:1:{self.place}:{self.kind}"

    @property
    def code(self) -> str:
        if self.kind in HANGS:
            return "hang"
        return "baseline-fault" if self.place.startswith("padded/") else "rank-fault"

    def complaints(self, report: dict[str, Any], limit_s: float) -> list[str]:
        """Errors in the report of the case that the fault hit."""
        verdict = "HANG" if self.kind in HANGS else "RANK_FAULT"
        found = [(reason["code"], reason.get("rank")) for reason in report["reasons"]]
        message = report["reasons"][0]["message"]
        complaints = [] if report["verdict"] == verdict else [report["verdict"]]
        complaints += [] if found == [(self.code, self.rank)] else [str(found)]
        complaints += [] if message.startswith(HOW[self.kind].format(rank=self.rank, place=self.place)) else [message]
        return complaints + (self._hang_complaints(report, message, limit_s) if self.kind in HANGS else [])

    def _hang_complaints(self, report: dict[str, Any], message: str, limit_s: float) -> list[str]:
        stood = re.search(r" for ([0-9.]+) s, allowed are [0-9.]+ s; rank (.*) waited for it in .+$", message)
        others = [rank for rank in range(RANKS) if rank != self.rank]
        if stood is None or float(stood[1]) > limit_s + 5 * slowed() or stood[2] != ", ".join(map(str, others)):
            return [message]
        stacks = report["stacks"]
        if stacks.keys() != {str(rank) for rank in range(RANKS)}:
            return [f"stacks of {sorted(stacks)}"]
        mine = "stopped" if self.kind == "stop" else "sitecustomize.py"
        fits = {
            str(rank): (mine if rank == self.rank else "most recent call first") in stacks[str(rank)]
            for rank in range(RANKS)
        }
        return [f"stack of {rank}: {stacks[rank]}" for rank, fit in fits.items() if not fit]


def covering() -> list[Fault]:
    """Faults at each place once; 7 kinds and 3 ranks have no common divisor, so each kind meets each rank.

    A rank other than 0 in the last stage occurs twice: it dies, or hangs, after its case has a result.
    """
    turns = enumerate(PLACES)
    late = [Fault(1, "report", "stop"), Fault(2, "report", "kill")]
    return [Fault(turn % RANKS, place, KINDS[turn % len(KINDS)]) for turn, place in turns] + late


def everything() -> Iterable[Fault]:
    return (Fault(*one) for one in product(range(RANKS), PLACES, KINDS))


CHOSEN = list(everything()) if SOAK else covering()
BATCHES = [CHOSEN[start : start + BATCH] for start in range(0, len(CHOSEN), BATCH)]


@pytest.mark.timeout(LONGEST_S)
@pytest.mark.parametrize("batch", BATCHES, ids=lambda batch: str(batch[0]))
def test_every_rank_fault_is_named_with_shared_memory(tmp_path: Path, batch: list[Fault]) -> None:
    assert kernels_beside(tmp_path, batch) == {"shared_memory"}


@pytest.mark.timeout(LONGEST_S)
def test_every_rank_fault_is_named_without_shared_memory(tmp_path: Path) -> None:
    """As between hosts, where ranks wait in gloo and learn through gloo that a peer is gone."""
    batch = [
        Fault(0, "padded/combine", "kill"),
        Fault(1, "control/dispatch", "stop"),
        Fault(2, "agree", "raise"),
        Fault(1, "gather", "segv"),
        Fault(2, "truncated/experts", "sleep"),
    ]
    assert kernels_beside(tmp_path, batch, DISTBENCH_SHARED_MEMORY="0") == {"all_to_all"}


def kernels_beside(tmp_path: Path, batch: list[Fault], **environ: str) -> set[str]:
    """Inject the faults, and check that each is named; return the transport kernels of the other cases, which pass."""
    timed = {"iterations": 2, "warmup": 1}
    limit_s = LIMIT_S * slowed()
    suite = write_suite(tmp_path / "suite.json", range(2 * len(batch) + 1), timeout=limit_s, **timed)
    variables = faulty(*map(str, batch), once=tmp_path / "fired") | environ
    with Bench(tmp_path / "out", "suite", suite, f"--nproc={RANKS}", **variables) as bench:
        assert bench.finish(LONGEST_S) == 3
        assert wait_until(bench.gone, 2)
    # In the order of the journal: a rank that dies at the start of a launch's second case may take the result of its
    # first case along, which then runs again.
    hit = [report for report in bench.reports if report["verdict"] != "PASS"]
    assert len(hit) == len(batch), [report["verdict"] for report in hit]
    complaints = {
        str(fault): found
        for fault, report in zip(batch, hit, strict=True)
        if (found := fault.complaints(report, limit_s))
    }
    assert not complaints
    passed = [report for report in bench.reports if report["verdict"] == "PASS"]
    assert len({report["name"] for report in passed}) == len(passed) == len(batch) + 1
    assert bench.summary["as_expected"] == len(passed)
    assert "Traceback" not in bench.stderr
    return {report["transport"]["kernel"] for report in passed}


# Faults of each launch, the seed of the case that they hit, and the expected message.
ODD = [
    ("1:0:boot:stop", 0, [("hang", 1, "rank 1 had not begun ")]),
    ("1:0:start:raise", 1, [("rank-fault", 1, "rank 1 ended by exit code 1 in start")]),
    (
        "2:1:padded/combine:kill+1:1:padded/combine:stop",
        3,
        [("baseline-fault", 2, "rank 2 ended by SIGKILL in padded/combine")],
    ),
    (
        "0:1:control/experts:sleep+1:1:control/experts:stop",
        5,
        [("hang", rank, "rank 0, rank 1 stood in control/experts for ") for rank in (0, 1)],
    ),
    ("1:1:truncated/check#2:stop", 7, [("hang", 1, "rank 1 stood in truncated/check for ")]),
    ("2:2:start:stop", 10, [("hang", 2, "rank 2 stood in start for ")]),
    ("1:1:done:stop", None, []),
]
OF_TWO_RANKS = 9


@pytest.mark.skipif(not SOAK, reason="half a minute of waiting: set DISTBENCH_SOAK=1")
@pytest.mark.timeout(LONGEST_S)
def test_rank_faults_at_launch_boundaries_and_in_pairs_are_named(tmp_path: Path) -> None:
    """Faults before and in the first stage, two at once, in a repeated stage, after an idle case, after the end."""
    cases = [{"seed": seed, "ep_size": 2 if seed == OF_TWO_RANKS else RANKS} for seed in range(12)]
    suite = tmp_path / "suite.json"
    defaults = TINY | {"timeout": LIMIT_S * slowed(), "repeats": 2}
    suite.write_text(json.dumps({"defaults": defaults, "include": cases}))
    variables = faulty(*(faults for faults, _, _ in ODD), once=tmp_path / "fired")
    with Bench(tmp_path / "out", "suite", suite, f"--nproc={RANKS}", **variables) as bench:
        assert bench.finish(LONGEST_S) == 3
        assert wait_until(bench.gone, 2)
    assert (tmp_path / "fired").stat().st_size == len(ODD)
    reports = {report["case"]["seed"]: report for report in bench.reports}
    assert len(reports) == len(bench.reports) == len(cases)
    for _, seed, expected in ODD:
        reasons = [] if seed is None else reports.pop(seed)["reasons"]
        assert [(reason["code"], reason.get("rank")) for reason in reasons] == [
            (code, rank) for code, rank, _ in expected
        ]
        for reason, (_, _, message) in zip(reasons, expected, strict=True):
            assert reason["message"].startswith(message)
    assert {report["verdict"] for report in reports.values()} == {"PASS"}
    (event,) = bench.summary["events"]
    assert event.startswith("rank 1 stood in done for ")
    assert f"event: {event}" in bench.stdout


def test_run_of_a_case_that_hangs_ends_within_its_limit_plus_five_seconds(tmp_path: Path) -> None:
    fired, limit_s = tmp_path / "fired", LIMIT_S * slowed()
    case = ("run", "--model=tiny", "--nproc=2", f"--timeout={limit_s}", "--max-dispatch-tokens-per-rank=64")
    with Bench(tmp_path / "out", *case, **faulty("1:0:repadded/experts:sleep", once=fired)) as bench:
        assert bench.finish() == 3
        assert time.time() - fired.stat().st_mtime < limit_s + 5 * slowed()
    assert bench.stdout.splitlines()[-1].startswith("HANG (emulated: ")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert (report["verdict"], report["exit_code"]) == ("HANG", 3)
    assert "sitecustomize.py" in report["stacks"]["1"]


def test_retried_cases_pass_and_consecutive_faults_stop_the_suite(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(6))
    once, twice = ["1:1:padded/experts:kill"], ["1:1:gather:kill", "0:0:agree:kill"]  # seeds 1 and 2
    faults = [*once, *twice, "1:0:padded/experts:kill", "0:0:start:kill"]
    limits = ("--retries=1", "--max-faults=2")
    with Bench(tmp_path / "out", "suite", suite, "--nproc=2", *limits, **faulty(*faults, once=tmp_path / "f")) as bench:
        assert bench.finish() == 3
    assert bench.verdicts == {"seed=0": "PASS", "seed=1": "PASS", "seed=2": "RANK_FAULT", "seed=3": "RANK_FAULT"}
    summary = bench.summary
    assert (summary["cases"], summary["finished"], summary["exit_code"]) == (6, 4, 3)
    assert summary["stopped"] == "2 cases in a row lost their ranks"
    assert "stopped early: 2 cases" in bench.stdout


def test_full_disk_ends_the_suite_and_fails_no_case(tmp_path: Path) -> None:
    suite = write_suite(tmp_path / "suite.json", range(3))
    command = ("suite", suite, "--nproc=2", "--quiet")
    with Bench(tmp_path / "out", *command, **faulty("0:1:report:full", once=tmp_path / "f")) as bench:
        assert bench.finish() == 3
        assert wait_until(bench.gone, 2)
    (told,) = bench.stderr.splitlines()
    assert told.startswith(
        "distbench: DISK_FULL: rank 0 raised OSError in report: [Errno 28] No space left on device: "
    )
    assert "'/out/results.jsonl'; free some space or name another folder; " in told
    assert bench.verdicts == {"seed=0": "PASS"}
    assert bench.summary["stopped"] in told
    with Bench(tmp_path / "out", *command) as bench:
        assert bench.finish() == 0
    assert bench.verdicts == {f"seed={seed}": "PASS" for seed in range(3)}
