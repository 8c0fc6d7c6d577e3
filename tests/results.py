"""Synthetic results of suites, for tests of their readers."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import msgspec

from distbench.case.stages import LAYER_STAGES, OWN_ARMS
from distbench.errors import Verdict
from distbench.report.journal import RESULTS


def result(name: str = "case", verdict: str = "PASS", **changes: Any) -> dict[str, Any]:
    """Report in its JSON form; `changes` replace keys."""
    return {
        "schema": "distbench.report/1",
        "name": name,
        "tags": [],
        "verdict": verdict,
        "exit_code": Verdict(verdict).exit_code,
        "expect": "PASS",
        "as_expected": verdict == "PASS",
        "reasons": [] if verdict == "PASS" else [{"code": "why", "message": f"{name} ended in {verdict}"}],
        "emulated": True,
        "stand_ins": ["collective for mori"],
        "case": {"model": "tiny", "ep_size": 2, "hash": f"hash of {name}"},
        "limit": limit(),
        "ranks": [{"rank": rank, "host": f"node{rank}", "device": "cpu", "total_recv": 6} for rank in range(2)],
        "lost": {"rows": 0},
        "diagnosis": [],
        "timing": timing() | {"wall_s": 0.25},
    } | changes


def limit(effective: int = 32, status: str = "proven", max_recv: int = 6) -> dict[str, Any]:
    """Limit of two ranks with 5 and 4 tokens, in the form of a report."""
    return {
        "requested": "sum32" if status == "proven" else str(effective),
        "effective": effective,
        "source": "default",
        "policy": "strict",
        "safe": status != "unsafe",
        "max_recv": max_recv,
        "sum_tokens": 9,
        "proof": {"status": status, "bound": 9, "formula": "sum of tokens over all ranks = 5+4 = 9"},
    }


def timing(scale: float = 1.0, samples: Iterable[float] = (1.0, 2.0, 3.0)) -> dict[str, Any]:
    """Times of all arms and stages, microseconds, each `scale` times `samples`."""
    laps = [scale * sample for sample in samples]
    figures = {"median_us": sorted(laps)[len(laps) // 2], "iterations": len(laps), "samples_us": laps}
    return {arm: dict.fromkeys(LAYER_STAGES, figures) for arm in OWN_ARMS}


def write_results(folder: Path, reports: Iterable[dict[str, Any]], cases: int | None = None) -> Path:
    """Write a journal, and a summary of `cases` cases if given; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [msgspec.json.encode(report) + b"\n" for report in reports]
    (folder / RESULTS).write_bytes(b"".join(lines))
    if cases is not None:
        (folder / "summary.json").write_bytes(msgspec.json.encode({"cases": cases, "finished": len(lines)}))
    return folder
