"""Groups that ran on other devices than most: `auto` takes the CPU where a node lacks accelerators, and passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from distbench.cluster.faults import Trial
from distbench.errors import Verdict

_CPU = ("cpu",)


def fail_other_devices(trials: Sequence[Trial]) -> list[Trial]:
    """Trials of one step, marked as failed where they ran on other devices than most; in a tie the CPU loses.

    Trials without a result have no devices and are not counted.
    """
    counts = Counter(trial.devices for trial in trials if trial.devices)
    usual = max(counts, key=lambda devices: (counts[devices], devices != _CPU, devices), default=())
    return [
        _failed(trial, f"{counts[usual]} of {counts.total()} on {' and '.join(usual)}")
        if trial.devices not in ((), usual) and not trial.failed
        else trial
        for trial in trials
    ]


def _failed(trial: Trial, others: str) -> Trial:
    lacking = Verdict.UNSUPPORTED
    reason = f"ran on {' and '.join(trial.devices)}, {others}"
    return msgspec.structs.replace(trial, exit_code=lacking.exit_code, verdict=lacking.value, reason=reason, times={})
