"""The share of the check (oracle, comparison of stages, gather and verdict) in the wall time of an exact case.

Start it under torchrun, a rank for each device: torchrun --nproc-per-node 2 scripts/bench_check.py num_experts=64
experts=triton. Each KEY=VALUE is a key of a case file. The time excludes the launch, so the share in the whole
command is smaller; it is that of rank 0, with the device synchronised at the end of each stage.
"""

from __future__ import annotations

import argparse
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

BOUND = 0.25
CHECKS = (Stage.CHECK, Stage.GATHER)
ROUNDS = 3
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
    """Measure, print on rank 0, and return 1 if the bound is missed in any round."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("values", nargs="*", metavar="KEY=VALUE", help="of the case; the model is deepseek-v3")
    clock = Clock()
    session = Session(clock, TIMEOUT_S, accelerated=True)
    given = dict(one.split("=", 1) for one in parser.parse_args().values)
    values = {key: int(value) if value.isdigit() else value for key, value in given.items()}
    case = resolve_case([Layer("bench", {"model": "deepseek-v3", **values})], session.world_size).case
    shares = [_share(session, clock, case) for _ in range(ROUNDS)]
    session.close()
    return 0 if all(share <= BOUND for share in shares) else 1


def _share(session: Session, clock: Clock, case: Case) -> float:
    clock.seconds.clear()
    start = _now()
    outcome = run_case(session, case)
    clock.mark(Stage.DONE)
    whole = _now() - start
    spent = {stage: seconds for stage, seconds in clock.seconds.items() if stage not in (Stage.START, Stage.DONE)}
    checks = _oracle_seconds(session, case) + sum(spent.get(stage, 0.0) for stage in CHECKS)
    if outcome is not None:
        stages = ", ".join(f"{stage} {seconds:.3f}" for stage, seconds in spent.items())
        print(
            f"{session.device} x{session.world_size}: {outcome.judgement.verdict.value}, {whole:.3f} s, of which "
            f"{checks:.3f} s check, {checks / whole:.1%}, at most {BOUND:.0%}: "
            f"{'ok' if checks / whole <= BOUND else 'MISSED'} ({stages})"
        )
    return checks / whole


@torch.inference_mode()
def _oracle_seconds(session: Session, case: Case) -> float:
    """Seconds of the tokens' oracle, which a case computes in its stage `workload`."""
    workload = workload_for(case, session.device)
    batch = workload.tokens(session.rank)
    start = _now()
    workload.expected(batch)
    return _now() - start


def _now() -> float:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
