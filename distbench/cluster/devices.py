"""Groups that ran on other devices than most: `auto` takes the CPU where a node's accelerators are gone, and passes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from distbench.cluster.faults import Trial
from distbench.errors import Verdict

_CPU = ("cpu",)


def fail_other_devices(trials: Sequence[Trial]) -> list[Trial]:
    """Return the trials of one step, those as failed that ran on other devices than most did; of a tie the CPU loses.

    Trials that came to no result have no devices and no say.
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
