#!/usr/bin/env python3
"""Make random ranks hang at random stages, and count the hangs that are named with the right rank and stage.

    scripts/hangs.py --nproc 2 --device cuda --experts triton

One suite has all hangs. Each costs its time limit and a new launch of the ranks. Exit code 0 if all are named right.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from distbench.case.stages import LAYER_STAGES, OWN_ARMS, Stage

STAGES = (Stage.DISPATCH, Stage.EXPERTS, Stage.COMBINE)


class Hang(NamedTuple):
    """A rank and the stage in which it hangs."""

    rank: int
    arm: str
    stage: str

    @property
    def fault(self) -> str:
        """The injected fault."""
        return f"hang:rank={self.rank},arm={self.arm},stage={self.stage}"


def main() -> int:
    """Run the hangs; print each that was named wrong, and the count."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=20, help="hangs (default: 20)")
    parser.add_argument("--nproc", type=int, default=2, help="ranks (default: 2)")
    parser.add_argument("--limit-s", type=float, default=5.0, help="time limit of each stage (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="which hangs (default: 0)")
    parser.add_argument("--out", type=Path, default=Path("distbench-out/hangs"), help="folder of the results")
    options, others = parser.parse_known_args()
    hangs = chosen(options.count, options.nproc, options.seed)
    options.out.mkdir(parents=True, exist_ok=True)
    suite = options.out / "hangs.json"
    suite.write_text(json.dumps(suite_of(hangs, options.limit_s)))
    flags = (
        f"--nproc={options.nproc}",
        f"--out={options.out}",
        "--rerun=all",
        f"--max-faults={len(hangs) + 1}",
        *others,
    )
    subprocess.run([sys.executable, "-m", "distbench", "suite", str(suite), *flags], check=False)
    right = sum(named_right(hang, report) for hang, report in zip(hangs, reports(options.out, hangs), strict=True))
    print(f"{right} of {len(hangs)} hangs named right")
    return 0 if right == len(hangs) else 1


def chosen(count: int, ranks: int, seed: int) -> list[Hang]:
    """Random hangs, each rank in turn."""
    chance = random.Random(seed)  # noqa: S311 - a choice of faults, no secret
    return [Hang(number % ranks, chance.choice(OWN_ARMS), chance.choice(STAGES)) for number in range(count)]


def suite_of(hangs: list[Hang], limit_s: float) -> dict[str, Any]:
    """Suite with one case for each hang."""
    limits = ",".join(f"{stage}={limit_s:g}" for stage in (*LAYER_STAGES, Stage.CHECK))
    defaults = {
        "model": "tiny",
        "tokens": 16,
        "max_dispatch_tokens_per_rank": 64,
        "limit": "max-recv",
        "policy": "unchecked",
        "stage_timeouts": limits,
    }
    cases = [{"name": f"hang {number}", "seed": number, "inject": hang.fault} for number, hang in enumerate(hangs)]
    return {"defaults": defaults, "include": [case | {"expect": "HANG"} for case in cases]}


def reports(out: Path, hangs: list[Hang]) -> list[dict[str, Any]]:
    """Reports in the order of the hangs; an empty one if a case left none."""
    found = [json.loads(line) for line in (out / "results.jsonl").read_text().splitlines()]
    by_name = {report["name"]: report for report in found}
    return [by_name.get(f"hang {number}", {}) for number in range(len(hangs))]


def named_right(hang: Hang, report: dict[str, Any]) -> bool:
    """Return whether a report names the rank and the stage of a hang and no other; print a line if it does not."""
    named = [(reason["rank"], reason["stage"]) for reason in report.get("reasons", [])]
    if report.get("verdict") == "HANG" and named == [(hang.rank, hang.stage)]:
        return True
    told = "; ".join(reason["message"] for reason in report.get("reasons", []))
    print(f"{hang.fault}: {report.get('verdict', 'no result')} of {named}: {told}")
    for rank, stack in report.get("stacks", {}).items():
        print(f"  rank {rank}: {stack}")
    return False


if __name__ == "__main__":
    sys.exit(main())
