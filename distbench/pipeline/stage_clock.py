"""The stages of checked passes: in the heartbeat, as durations, and with the case's jitter before each."""

from __future__ import annotations

import random
import time

from distbench.case.spec import Case
from distbench.case.stages import Stage
from distbench.distributed.heartbeat import Heartbeat

_LAPS = 4096


class StageClock:
    """Marks the stages of one rank; `durations_us[arm][stage]` has one entry for each pass, the first 4096."""

    def __init__(self, heartbeat: Heartbeat, case: Case, rank: int) -> None:
        self.durations_us: dict[str, dict[str, list[float]]] = {}
        self._heartbeat = heartbeat
        self._jitter_ms = case.jitter
        self._waits = random.Random(f"{case.seed}/{rank}")  # noqa: S311 - jitter, no secret
        self._arm, self._stage, self._since = "", "", 0

    def mark(self, stage: Stage) -> None:
        """Record that this rank enters `stage` of the heartbeat's arm, after a random wait where the case has jitter.

        Time in checks is the bench's own, and is not kept.
        """
        now = time.perf_counter_ns()
        if self._stage and self._stage != Stage.CHECK:
            laps = self.durations_us.setdefault(self._arm, {}).setdefault(self._stage, [])
            if len(laps) < _LAPS:
                laps.append((now - self._since) / 1000)
        if self._jitter_ms:
            time.sleep(self._waits.random() * self._jitter_ms / 1000)
            now = time.perf_counter_ns()
        self._stage, self._arm, self._since = stage, self._heartbeat.arm, now
        self._heartbeat.mark(stage)
