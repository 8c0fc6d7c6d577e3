"""The passes of one case on one rank: its arms, once or repeatedly, then timed, then the replays of a graph."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from distbench.case.stages import TIMED_ARMS, Arm, Stage
from distbench.distributed.session import Session
from distbench.experts.base import Cut
from distbench.pipeline.observer import Measured, Observer
from distbench.pipeline.parts import Parts
from distbench.pipeline.replays import replay_graph
from distbench.pipeline.stage_clock import StageClock
from distbench.pipeline.timed_arms import time_arms
from distbench.pipeline.truncation import arms_of
from distbench.pipeline.turned import turned
from distbench.verify.records import ResolvedCase


class Passes:
    """Runs the arms; the observer sees what each pass made."""

    def __init__(self, session: Session, resolved: ResolvedCase, parts: Parts, observer: Observer) -> None:
        self._session, self._resolved, self._parts, self._observer = session, resolved, parts, observer
        self._clock = StageClock(session.heartbeat, resolved.case, session.rank)

    def run(self) -> Measured:
        """Run every arm `repeats` times. Collective."""
        case, observer = self._resolved.case, self._observer
        arms, parts = self._arms(), self._parts_of_arms()
        for repeat in range(case.repeats):
            fresh: dict[str, Tensor] = {
                arm: self._run_arm(arm, parts.get(arm, self._parts).layer(cut, observer.inspector(arm)))
                for arm, cut in arms.items()
                if arm != Arm.PADDED or repeat == 0
            }
            if self._parts.caller is not None and not self._resolved.refused:
                fresh[Arm.PRODUCTION] = self._run_arm(Arm.PRODUCTION, self._production)
            lost = observer.share_losses()
            self._clock.mark(Stage.CHECK)
            wrong = observer.end_repeat(fresh, lost)
            self._session.heartbeat.repeat += 1
            if case.until_failure and wrong:
                break
        self._clock.mark(Stage.TIMING)
        timed = {arm: cut for arm, cut in arms.items() if arm in TIMED_ARMS}
        times = time_arms(self._session, case, self._parts, timed, observer)
        replays = replay_graph(self._parts, self._session.rank, observer)
        layers = []
        if case.graph == "layer":
            from distbench.pipeline.layer_graph import replay_layers  # noqa: PLC0415 - only with that key

            layers = replay_layers(self._session, self._parts, timed, observer)
        self._clock.mark(Stage.GATHER)
        observer.end()
        return Measured(self._clock.durations_us, times.timed, times.device_state, replays, layers)

    def _arms(self) -> dict[Arm, Cut]:
        resolved, injector = self._resolved, self._parts.injector
        arms = arms_of(resolved.limit, resolved.case.policy, refused=resolved.refused)
        return (
            arms
            if injector is None or self._parts.sub_batches
            else {arm: injector.around(cut) for arm, cut in arms.items()}
        )

    def _parts_of_arms(self) -> dict[Arm, Parts]:
        """Return the parts of arms whose tokens are one place further, so that no two arms in a row send the same.

        Where rows are lost, the cut arms lose those of the same places.
        """
        other = turned(self._parts, self._resolved.case)
        return {Arm.CONTROL: other} if self._resolved.lossy else {Arm.CONTROL: other, Arm.REPADDED: other}

    def _production(self, mark: Callable[[Stage], None]) -> Tensor:
        from distbench.pipeline.production import run_production  # noqa: PLC0415 - nothing is loaded without a caller

        observer = self._observer
        return run_production(self._parts, observer.inspector(Arm.PRODUCTION), observer.take_call, mark)

    def _run_arm(self, arm: Arm, layer: Callable[[Callable[[Stage], None]], Tensor]) -> Tensor:
        heartbeat = self._session.heartbeat
        heartbeat.arm = arm
        self._parts.forget()
        combined = layer(self._clock.mark).clone()  # a transport may give the same memory again in the next arm
        self._clock.mark(Stage.CHECK)
        self._observer.take(arm, combined)
        heartbeat.arm = ""
        return combined
