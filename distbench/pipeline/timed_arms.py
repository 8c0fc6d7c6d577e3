"""Timed iterations of a case's arms, one after another, after the checked passes."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import msgspec

from distbench.case.spec import Case
from distbench.case.stages import Arm, Stage
from distbench.distributed.session import Session
from distbench.experts.base import Cut
from distbench.pipeline.observer import Observer
from distbench.pipeline.parts import Parts
from distbench.pipeline.timing import Timer
from distbench.utils.devices import DeviceState
from distbench.verify.records import Timed


class ArmTimes(NamedTuple):
    """Timings of the arms, and the state of the rank's device while the last of them ran; None on the CPU."""

    timed: dict[str, Timed]
    device_state: DeviceState | None


def time_arms(session: Session, case: Case, parts: Parts, arms: Mapping[Arm, Cut], observer: Observer) -> ArmTimes:
    """Time `arms`, and compare the last output of each with that of its checked pass. Collective."""
    if not case.iterations:
        return ArmTimes({}, None)
    timer = Timer(session, case)
    found: dict[str, Timed] = {}
    for arm, cut in arms.items():
        session.heartbeat.arm = arm
        parts.forget()
        layer = parts.layer(cut, None)
        timed = timer.time(layer, observer.outputs[arm], partial(observer.error_of, arm))
        if timed.error is not None:
            timed = msgspec.structs.replace(timed, apart=observer.between(arm, Stage.COMBINE))
        found[arm] = _with_graphs(parts, observer.kernels[arm]["rows"], timed)
    state = timer.state_while(layer) if session.device.type != "cpu" else None
    session.heartbeat.arm = ""
    return ArmTimes(found, state)


def _with_graphs(parts: Parts, rows: int, timed: Timed) -> Timed:
    """Timings with the memory that the arm's graph holds, and without that of other graphs."""
    graphed, peak = parts.graphed, timed.peak_device_bytes
    if graphed is None or peak is None:
        return timed
    return msgspec.structs.replace(timed, peak_device_bytes=peak + graphed.uncounted_bytes(rows))
