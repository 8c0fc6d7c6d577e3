"""The share of the check (oracle, comparison of stages, gather and verdict) in the wall time of a case.

Start it under torchrun, a rank for each device: torchrun --nproc-per-node 2 scripts/bench_check.py num_experts=64
experts=triton. Each KEY=VALUE is a key of a case file. Cases with successive seeds run in one launch. The first, which
loads kernels and joins NCCL, is held against one bound. Triton compiles its kernels again for some numbers of rows, so
the seeds run twice, and the second time each is held against the bound of a warm case. The time excludes the launch,
so the share in the whole command is smaller; it is that of rank 0, with the device synchronised at the end of each
stage. The bounds are those of devices: on the CPU there is none.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
import time
from collections import defaultdict

import torch

from distbench.case.resolve import Layer, resolve_case
from distbench.case.spec import Case
from distbench.case.stages import Stage
from distbench.distributed.heartbeat import Heartbeat
from distbench.distributed.session import Session
from distbench.pipeline.inputs import workload_for
from distbench.pipeline.run_case import run_case
from distbench.workload.inputs import Workload

FIRST_BOUND, WARM_BOUND = 0.25, 0.31
CHECKS = (Stage.CHECK, Stage.GATHER)
SEEDS = 4
TIMEOUT_S = 300.0


class Clock(Heartbeat):
    """Heartbeat that adds up the seconds of each stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stage, self._since = "", 0.0
        super().__init__(None)

    def mark(self, stage: Stage) -> None:
        """See `Heartbeat.mark`."""
        now = _now()
        if self._stage:
            self.seconds[self._stage] += now - self._since
        self._stage, self._since = stage, now
        super().mark(stage)


def main() -> int:
    """Measure, print on rank 0, and return 1 if a case misses its bound."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("values", nargs="*", metavar="KEY=VALUE", help="of the case; the model is deepseek-v3")
    given = dict(one.split("=", 1) for one in parser.parse_args().values)
    values = {key: int(value) if value.isdigit() else value for key, value in given.items()}
    if "RANK" not in os.environ:
        parser.error("RANK is not set; start it under torchrun")
    clock = Clock()
    session = Session(clock, TIMEOUT_S, accelerated=True)
    held = []
    for turn, seed in enumerate((*range(SEEDS), *range(SEEDS))):
        layer = Layer("bench", {"model": "deepseek-v3", **values, "seed": seed})
        case = resolve_case([layer], session.world_size).case
        if 0 < turn < SEEDS:
            run_case(session, case)
        else:
            held.append(_is_held(session, clock, case, "warm" if turn else "first"))
    session.close()
    return 0 if all(held) else 1


def _is_held(session: Session, clock: Clock, case: Case, which: str) -> bool:
    """Run a case and print its share; return whether it holds the bound of the `first` case or of a `warm` one."""
    bound = math.inf if session.device.type == "cpu" else WARM_BOUND if which == "warm" else FIRST_BOUND
    clock.seconds.clear()
    start = _now()
    outcome = run_case(session, case)
    clock.mark(Stage.DONE)
    whole = _now() - start
    spent = {stage: seconds for stage, seconds in clock.seconds.items() if stage not in (Stage.START, Stage.DONE)}
    others = _others_seconds(session, case)
    checks = others + sum(spent.get(stage, 0.0) for stage in CHECKS)
    held = checks / whole <= bound
    if outcome is not None:
        stages = ", ".join(f"{stage} {seconds * 1000:.1f}" for stage, seconds in spent.items())
        print(
            f"{session.device} x{session.world_size}, {which} case: {outcome.judgement.verdict.value}, "
            f"{whole * 1000:.1f} ms, of which {checks * 1000:.1f} ms check, {checks / whole:.1%}"
            f"{_told(which, bound, held=held)} ({stages}; of agree {others * 1000:.1f} check)",
            flush=True,
        )
    return held


def _told(which: str, bound: float, *, held: bool) -> str:
    return "" if bound == math.inf else f"; bound of a {which} case {bound:.0%}: {'ok' if held else 'MISSED'}"


@torch.inference_mode()
def _others_seconds(session: Session, case: Case) -> float:
    """Seconds that a rank takes longer to make its tokens because it makes those of other ranks with them.

    The check needs those; a case makes them in its stage `agree`. 0 where it makes them when they arrive.
    """
    together = workload_for(case, session.device)
    alone = Workload(
        together.numerics,
        together.slots,
        together.routing,
        seed=together.seed,
        tokens_per_rank=together.tokens_per_rank,
        hidden_size=together.hidden_size,
        dispatch_dtype=case.dispatch_dtype,
        fp8=together.fp8,
        device=together.device,
    )
    return max(_seconds_of_tokens(together, session.rank) - _seconds_of_tokens(alone, session.rank), 0.0)


def _seconds_of_tokens(workload: Workload, rank: int) -> float:
    start = _now()
    workload.tokens(rank)
    return _now() - start


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
