"""Pages of every kind, small and large, harmless and hostile, as the commands write them."""

from __future__ import annotations

import contextlib
import io
import json
import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from distbench.case.stages import LAYER_STAGES, OWN_ARMS
from distbench.cli.main import main
from distbench.tools.cluster.attribution import GroupRun
from distbench.tools.cluster.plan import STEPS, Round, Step
from distbench.tools.cluster.validation import FILE, document, validate
from tests.pages import HOSTILE, OLD, case, failing, hostile, many_cases, ranks_1024
from tests.results import limit, result, write_results

_RANKS = 8
_BASE_US = {"dispatch": 82.0, "truncate": 3.1, "experts": 318.0, "combine": 97.0}


def times(seed: int, scale: float = 1.0, samples: int = 40) -> dict[str, Any]:
    """Times of all arms with noise; those of the truncated experts are `scale` times as long."""
    draw = random.Random(seed)
    made: dict[str, Any] = {}
    for arm in OWN_ARMS:
        made[arm] = {}
        for stage in LAYER_STAGES:
            base = _BASE_US[stage] * (scale if (arm, stage) == ("truncated", "experts") else 1.0)
            laps = [base * math.exp(draw.gauss(0, 0.04)) for _ in range(samples)]
            ordered = sorted(laps)
            made[arm][stage] = {"median_us": ordered[samples // 2], "p99_us": ordered[-1], "samples_us": laps}
    return made | {"wall_s": 1.5}


def rich(**changes: Any) -> dict[str, Any]:
    """A failing case of eight ranks with a figure in every picture."""
    report = failing()
    draw = random.Random(1)
    rows = [[draw.randint(20, 160) for _ in range(_RANKS)] for _ in range(_RANKS)]
    received = [sum(column) for column in zip(*rows, strict=True)]
    cut = sorted(received)[-2] - 20
    lost = {str(rank): count - cut for rank, count in enumerate(received) if count > cut}
    kernels = report["ranks"][0]["kernels"]
    ranks = [
        report["ranks"][0]
        | {"rank": rank, "host": f"mi300x-{rank // 4}", "device": "gfx942", "tokens": 256, "total_recv": count}
        | {"capacity": 2048, "limit": cut, "lost_rows": max(count - cut, 0), "kernels": kernels}
        for rank, count in enumerate(received)
    ]
    tokens = [[rank, token] for rank in (1, 4, 6) for token in range(3, 250, 31)]
    cells = ["0" * 32 if block % 9 else f"{'8' * 20}{'5' * 6}{'0' * 6}" for block in range(64)]
    error = {"family": "ck", "rows": 697, "nan_rows": 0, "bias": -0.4, "worst": 0.0058, "ideal_worst": 0.0069}
    errors = [
        error
        | {"arm": arm, "stage": stage, "ratio": [0.99, high], "within": high < 1.06, "outside": []}
        | {"allowed": {"ratio_low": 0.94, "ratio_high": 1.06, "bias": 4.0, "worst": 0.01}}
        for arm, high in (("padded", 1.004), ("truncated", 1.12))
        for stage in ("experts", "combine")
    ]
    made = {
        "ranks": ranks,
        "sent": {"ranks_per_block": 1, "rows": rows},
        "limit": limit(cut, "unsafe", max(received)),
        "lost": {"rows": sum(lost.values()), "tokens": tokens, "by_rank": lost},
        "differing": {"arms": ["padded", "truncated"], "tokens_per_cell": 32, "columns_per_cell": 64, "cells": cells},
        "errors": errors,
        "timing": times(1),
        "case": report["case"] | {"hidden_size": 2048},
    }
    return report | made | changes


def sweep() -> list[dict[str, Any]]:
    """Reports of a sweep over limits, the smallest two unsafe; the largest has another kernel."""
    base = json.loads((OLD / "reports" / "pass.json").read_text())
    made = []
    for number, rows in enumerate((128, 256, 384, 512, 1024, 2048)):
        safe = rows > 300
        layer = {"median_us": 300 + rows / 4, "p99_us": 320 + rows / 3}
        timing = {arm: {"experts": layer, "layer": layer} for arm in ("padded", "truncated")} if safe else {}
        kernel = base["ranks"][0]["kernels"]["truncated"] | {"rows": rows, "bucket": 512 if rows <= 512 else 2048}
        kernels = base["ranks"][0]["kernels"] | {"truncated": kernel}
        made.append(
            base
            | {"name": f"limit {rows}", "suite": "distbench sweep", "timing": timing | {"wall_s": 0.5}}
            | {"case": base["case"] | {"limit": str(rows), "hash": f"{number:064d}"}}
            | {"limit": limit(rows, "proven" if rows >= 512 else "this batch" if safe else "unsafe", 300)}
            | {"ranks": [rank | {"kernels": kernels if safe else {}} for rank in base["ranks"]]}
            | {"memory": {"device": {"truncated": {"peak_bytes_max_over_ranks": (1 << 30) + rows * 10**6}}}}
            | {"method": {"clock": "device events"} if safe else {}}
            | ({} if safe else {"verdict": "UNDER_LIMIT", "exit_code": 1})
        )
    return made


def plan(folder: Path, nodes: list[str], bad: int = 1, why: str = "rows lost on rank 3") -> None:
    """Write the document of a cluster's plan: a bad link, and a slow node."""
    link, slow = {nodes[bad], nodes[-2]}, nodes[3]

    def run(step: Step, groups: Round) -> list[GroupRun]:
        return [
            GroupRun(
                step=step,
                nodes=group,
                exit_code=1 if link <= set(group) else 0,
                verdict="CORRUPT" if link <= set(group) else "PASS",
                reason=why if link <= set(group) else "",
                wall_s=21.5,
                devices=("gfx942",),
                times={
                    stage: {
                        f"case {key}": (1.4 if slow in group else 1)
                        * random.Random(f"{group}{key}{stage}").uniform(1, 1.05)
                        for key in range(6)
                    }
                    for stage in ("dispatch", "experts", "combine")
                },
            )
            for group in groups
        ]

    folder.mkdir()
    (folder / FILE).write_bytes(document(validate(tuple(nodes), STEPS, run, emulated=False, suite="smoke")))


def _hostile_results() -> list[dict[str, Any]]:
    names = ("pass", "under-limit", "nondeterministic")
    made = [hostile(rich() | json.loads((OLD / "reports" / f"{name}.json").read_text())) for name in names]
    for number, one in enumerate(made):
        one["case"]["hash"] = str(number)
        one["timing"] = {HOSTILE: {HOSTILE: {"median_us": 1.0, "samples_us": [1.0]}}, "wall_s": 1.0}
    return made


def _compare(folder: Path) -> None:
    facts = {"hosts": [HOSTILE], "devices": ["gfx942"], "versions": {"torch": HOSTILE}, "commits": {}, "variables": {}}
    old = [result(f"case {seed}", timing=times(seed)) for seed in range(6)] + [result("gone")]
    new = [result(f"case {seed}", timing=times(seed + 50, 1.15)) for seed in range(5)]
    new += [result("case 5", "CORRUPT", environment=facts), result("new <b>", "HANG")]
    write_results(folder / "old", old)
    write_results(folder / "new", new)
    _quietly("compare", str(folder / "old"), str(folder / "new"), "--report", f"html={folder / 'results.html'}")


def _trend(folder: Path) -> None:
    for night in range(14):
        reports = [
            result(f"case {number}", "CORRUPT" if number == 3 and night > 8 else "PASS", **case(number))
            | {"timing": times(20 * night + number, 1.3 if night == 13 else 1.0, samples=12)}
            | {"ended": f"2026-11-{night + 1:02}T03:00:00Z"}
            for number in range(8)
        ]
        write_results(folder / f"night-{night:02}", reports)
    _quietly("trend", str(folder), "--report", f"html={folder / 'results.html'}", "--out", str(folder))


def _advise(folder: Path) -> None:
    layer = ("--model", "deepseek-v3", "--ep-size", "16", "--tokens", "128", "--limit", "912", "--steps", "2000")
    folder.mkdir()
    _quietly("advise", *layer, "--html", str(folder / "results.html"))


def _quietly(*arguments: str) -> None:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        main(list(arguments))


def _report(folder: Path) -> None:
    _quietly("report", str(folder), "--report", "html")


def _results(reports: Callable[[], list[dict[str, Any]]]) -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        write_results(folder, reports())
        _report(folder)

    return write


def _plan(nodes: list[str], why: str = "rows lost on rank 3") -> Callable[[Path], None]:
    def write(folder: Path) -> None:
        plan(folder, nodes, why=why)
        _report(folder)

    return write


SAMPLES: dict[str, Callable[[Path], None]] = {
    "case": _results(lambda: [rich()]),
    "passing": _results(lambda: [json.loads((OLD / "reports" / "pass.json").read_text()) | {"suite": "distbench run"}]),
    "ranks-1024": _results(lambda: [result("wide", "CORRUPT", **ranks_1024(), suite="distbench run")]),
    "suite-12": _results(
        lambda: [
            rich(**case(number, limit=str(number % 4), routing=str(number % 3)), name=f"case {number}")
            for number in range(12)
        ]
    ),
    "suite-500": _results(lambda: many_cases(500)),
    "suite-5000": _results(lambda: many_cases(5000)),
    "sweep": _results(sweep),
    "compare": _compare,
    "trend": _trend,
    "advise": _advise,
    "cluster": _plan([f"node{number:02d}" for number in range(12)]),
    "cluster-100": _plan([f"gpu-node-{number:03d}" for number in range(100)]),
    "hostile-suite": _results(_hostile_results),
    "hostile-case": _results(lambda: _hostile_results()[1:2]),
    "hostile-cluster": _plan([f"{HOSTILE}{number}" for number in range(7)], HOSTILE * 9),
}
"""What writes a page of each kind into a folder, as `results.html`."""
