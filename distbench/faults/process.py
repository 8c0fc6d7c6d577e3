"""Faults of a whole rank: it hangs, is late, or dies."""

from __future__ import annotations

import os
import signal
import time

from distbench.case.stages import Arm, Stage
from distbench.faults.base import Fault
from distbench.faults.options import one_of, real

_FOREVER_S = 86_400.0


class Hang(Fault):
    """The rank hangs as it enters a stage."""

    name, stage, verdict, arm = "hang", Stage.DISPATCH, "HANG", Arm.TRUNCATED
    bug = "mori 101, sglang 22072: ranks wait for one that does not come"
    options = {"stage": one_of(Stage.DISPATCH, Stage.EXPERTS, Stage.COMBINE)}
    needs = "a limit, for arm truncated"
    shape = {"stage_timeouts": "dispatch=1.5,combine=1.5", "policy": "unchecked"}

    def enter(self, stage: str) -> None:
        """Sleep for a day."""
        if stage == self.chosen["stage"]:
            time.sleep(_FOREVER_S)


class Delay(Fault):
    """The rank is late at every stage, which is no error."""

    name, stage, verdict = "delay", "", "PASS"
    bug = "mori 80, 93: ranks out of step; a correct transport tolerates it"
    options = {"ms": real(20.0, 0.0, 60_000.0)}

    def enter(self, stage: str) -> None:
        """Sleep."""
        self.hits += 1
        time.sleep(self.chosen["ms"] / 1000)


class Death(Fault):
    """The rank is killed as it enters a stage."""

    name, stage, verdict, arm = "death", Stage.COMBINE, "RANK_FAULT", Arm.TRUNCATED
    bug = "sglang 10195: memory faults of expert-parallel ranks; vllm PR 44428: a real kill, not an exception"
    options = {"stage": one_of(Stage.COMBINE, Stage.DISPATCH, Stage.EXPERTS)}
    needs = "a limit, for arm truncated"
    shape = {"policy": "unchecked"}

    def enter(self, stage: str) -> None:
        """Die by SIGKILL."""
        if stage == self.chosen["stage"]:
            os.kill(os.getpid(), signal.SIGKILL)


class LateDeath(Fault):
    """The rank dies after the last barrier, when every result has been delivered."""

    name, stage, verdict = "late-death", Stage.GATHER, "RANK_FAULT"
    bug = "mori 342: all iterations pass, then a fault after the last sync and barrier"

    def leave(self) -> None:
        """Die by SIGSEGV."""
        os.kill(os.getpid(), signal.SIGSEGV)
